"""The result of an audit in sentences, the answer first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from xent._util.text import counted, printable

if TYPE_CHECKING:
    from xent.auditing.result import AuditResult

MUCH = 0.5
"""The share of the loss that the pairs of a sentence carry."""


def sentences(result: AuditResult) -> list[str]:
    """Return what a reader wants to know, most important first."""
    found = result.measures
    said = [f"{_loss(result)}; {_knowing(result)}"]
    for part in (_pairs(result), _temperature(result), _suspects(result), _infinite(result)):
        if part:
            said.append(part)
    said.append(
        f"{100 * found.accuracy:.2f} % of the predictions are right, with a mean confidence of "
        f"{100 * found.confidence:.2f} %"
    )
    return said + [f"not measured: {what}" for what in result.left_out]


def headline(result: AuditResult) -> str:
    """Return the first sentence, with what the parts of the loss say in short."""
    parts = (f"{_loss(result)}; {_knowing(result)}", _pairs(result), _temperature(result), _suspects(result))
    return "; ".join(part for part in parts if part)


def _loss(result: AuditResult) -> str:
    found = result.measures
    if found.log_loss is None:
        finite = (
            "" if found.finite_log_loss is None else f", {found.finite_log_loss:.4g} nats over the others"
        )
        return f"infinite loss in {found.infinite_rows:,} of {counted(result.count, 'row')}{finite}"
    if found.low is None or found.high is None:
        return f"{found.log_loss:.4g} nats"
    return f"{found.log_loss:.4g} nats (95 %: {found.low:.4g} to {found.high:.4g})"


def _knowing(result: AuditResult) -> str:
    return f"knowing only the classes' frequencies costs {result.measures.label_entropy:.4g}"


def _pairs(result: AuditResult) -> str:
    """Return how few pairs carry half of the loss, or what the heaviest one carries."""
    carried, count = 0.0, 0
    for pair in result.pairs:
        carried, count = carried + pair.share, count + 1
        if carried >= MUCH:
            break
    if not count or carried <= 0:
        return ""
    possible = result.classes * (result.classes - 1)
    first = result.pairs[0]
    names = f"{short(first.name)} with rival {short(first.rival)}"
    if carried < MUCH or count > max(3, possible // 4):
        return f"the loss is spread over many pairs: the heaviest, {names}, has {100 * first.share:.0f} %"
    if count == 1:
        return f"{100 * carried:.0f} % of the loss sits in one pair, {names}"
    return f"{100 * carried:.0f} % of the loss sits in {count} of {possible:,} pairs, first {names}"


def _temperature(result: AuditResult) -> str:
    found = result.measures
    if found.temperature is None:
        return "" if result.sweeps < 2 else "no temperature is the best one: the loss keeps falling"
    if found.temperature_saving is None or found.temperature_saving < 1e-3 * (found.finite_log_loss or 0):
        return "no temperature would save much"
    return f"a temperature of {found.temperature:.3g} would save {found.temperature_saving:.3g}"


def _suspects(result: AuditResult) -> str:
    found = result.measures
    if found.suspects is None or found.suspects_low is None or found.suspects_high is None:
        return ""
    if not found.suspects:
        return "no label looks wrong"
    noun = "label looks" if found.suspects == 1 else "labels look"
    return f"{found.suspects:,} {noun} wrong (95 %: {found.suspects_low:,.0f} to {found.suspects_high:,.0f})"


def _infinite(result: AuditResult) -> str:
    count = result.measures.infinite_rows
    if not count or result.measures.log_loss is not None:
        return ""
    return f"the class of {counted(count, 'row')} has probability 0"


def short(name: str, most: int = 40) -> str:
    """Return a class as a sentence names it: printable, cut where it is long."""
    text = printable(name)
    return text if len(text) <= most else text[: most - 1] + "…"
