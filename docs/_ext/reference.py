"""The reference: a page for each public name, tables of the options, made from the package at every build.

docs/reference/names.toml says which group a name belongs to and which page explains it; all else is in the
docstrings and in `xent._core.validators`. What is made lies in docs/reference/api/, which is not committed.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docstrings import arguments, escaped
from sphinx.application import Sphinx

FIELD = re.compile(r"^    (\w+): ([^=#\n]+?)(?:\s*= ([^#\n]+?))?\s*(?:# (.+))?$", re.M)


@dataclasses.dataclass(frozen=True)
class Group:
    """A group of public names, with the page that explains them."""

    title: str
    page: str  # below docs, without its suffix
    names: list[str]  # in full: xent.cross_entropy
    data: dict[str, str] = dataclasses.field(default_factory=dict)  # constants: what they are
    options: bool = True  # the functions' arguments of an option's name are that option

    @property
    def slug(self) -> str:
        """The name of the group's page."""
        return re.sub(r"\W+", "-", self.title.lower()).strip("-")


def groups(folder: Path) -> list[Group]:
    """Return the groups of a folder's names.toml."""
    return [Group(**each) for each in tomllib.loads((folder / "names.toml").read_text("utf-8"))["group"]]


def found(name: str) -> Any:
    """Return the object of a name in full."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def first_sentence(thing: Any) -> str:
    """Return the first sentence of a docstring, on one line."""
    text = " ".join((inspect.getdoc(thing) or "").split("\n\n")[0].split())
    end = re.search(r"[.:](?= |$)", text)
    return text[: end.start()] + "." if end else text


def page_of(name: str, group: Group, titles: dict[str, str]) -> str:
    """Return the page of a name."""
    thing = found(name)
    lines = [f"# {name}", ""]
    lines += [f"Explained in [{titles[group.page]}](../../{group.page}.md).", ""]
    directive = "autoclass" if inspect.isclass(thing) else "autofunction"
    if not callable(thing):
        lines += ["```{eval-rst}", f".. py:data:: {name}", "```", "", group.data[name], ""]
        return "\n".join(lines)
    lines += ["```{eval-rst}", f".. {directive}:: {name}"]
    fields = fields_of(thing) if inspect.isclass(thing) else []
    if inspect.isclass(thing):
        lines += ["   :members:", "   :special-members: __call__, __matmul__"]
        if fields:
            lines += [f"   :exclude-members: {', '.join(field[0] for field in fields)}"]
    lines += ["```", ""]
    if fields:
        lines += ["## Fields", "", "| field | type | default | what |", "|---|---|---|---|"]
        for field, kind, default, what in fields:
            cell = f"`{default}`" if default else ""
            lines.append(f"| `{field}` | `{kind}` | {cell} | {what} |".replace(" | None", " \\| None"))
    return "\n".join(lines) + "\n"


def fields_of(thing: type) -> list[tuple[str, str, str, str]]:
    """Return name, type, default and comment of the fields of a record or a named tuple."""
    if not (dataclasses.is_dataclass(thing) or hasattr(thing, "_fields")):
        return []
    names = (
        [f.name for f in dataclasses.fields(thing) if f.name[0] != "_"]
        if dataclasses.is_dataclass(thing)
        else list(thing._fields)
    )
    body = inspect.getsource(thing)
    return [
        (name, kind.strip(), (default or "").strip(), (what or "").strip())
        for name, kind, default, what in FIELD.findall(body)
        if name in names
    ]


def table_of(group: Group, folder: str) -> list[str]:
    """Return a table of the names and first sentences of a group, with links into a folder."""
    lines = ["| name | what |", "|---|---|"]
    for name in group.names:
        what = group.data.get(name) or first_sentence(found(name))
        lines.append(f"| [`{name.removeprefix('xent.')}`]({folder}{name}.md) | {what} |")
    return [*lines, ""]


def page_of_group(group: Group, titles: dict[str, str]) -> str:
    """Return the page of a group."""
    lines = [f"# {group.title}", "", f"Explained in [{titles[group.page]}](../../{group.page}.md).", ""]
    lines += table_of(group, "")
    lines += ["```{toctree}", ":hidden:", ""]
    lines += [f"{name.removeprefix('xent.')} <{name}>" for name in group.names]
    return "\n".join([*lines, "```", ""])


def all_groups(groups: list[Group]) -> str:
    """Return all groups, each as a table, with their pages as hidden contents."""
    lines = []
    for group in groups:
        lines += [f"## {group.title}", "", *table_of(group, "api/")]
    lines += ["```{toctree}", ":hidden:", ""]
    return "\n".join([*lines, *(f"api/{group.slug}" for group in groups), "```", ""])


def options() -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    """Yield each group of options: its title, and name, default and values of each."""
    from xent._arguments import options as module
    from xent._core import validators

    for kind in (module.TargetOptions, module.LogitOptions, module.ReductionOptions, module.Execution):
        rows = []
        for name, type_, default, what in fields_of(kind):
            rule = validators.OPTIONS.get(name)
            values = values_of(rule) if rule is not None else what or f"`{type_}`"
            rows.append((name, default, values))
        yield first_sentence(kind).rstrip("."), rows


def values_of(rule: Any) -> str:
    """Return in words what a validator takes."""
    if hasattr(rule, "kind"):
        words = f"a `torch.{rule.kind.__name__}`, or None"
    elif hasattr(rule, "names"):
        words = " or ".join(f'`"{name}"`' for name in rule.names)
    else:
        words = getattr(rule, "takes", "") or first_sentence(type(rule)).rstrip(".")
    return f"{words} or `None`" if getattr(rule, "optional", False) and "None" not in words else words


def all_options(names: list[str]) -> str:
    """Return the options, each with its default, its values, its meaning and the functions that have it."""
    having: dict[str, list[str]] = {}
    meaning: dict[str, str] = {}
    for name in names:
        thing = found(name)
        if inspect.isfunction(thing):
            _, _, texts = arguments((inspect.getdoc(thing) or "").splitlines())
            for parameter in inspect.signature(thing).parameters:
                having.setdefault(parameter, []).append(name)
                if parameter in texts and not texts[parameter].startswith("as in"):
                    meaning.setdefault(parameter, texts[parameter])
    lines = []
    for title, rows in options():
        lines += [f"## {title}", ""]
        for name, default, values in rows:
            if name in having:
                links = ", ".join(f"{{py:func}}`{n.removeprefix('xent.')} <{n}>`" for n in having[name])
                lines += [f"### `{name}`", "", f"Default `{default}`; {values}.", ""]
                lines += ["```{eval-rst}", escaped(meaning.get(name, "")), "```", "", f"In {links}.", ""]
    return "\n".join(lines)


def titles_of(docs: Path, pages: set[str]) -> dict[str, str]:
    """Return the title of each page."""
    found = {}
    for page in pages:
        heading = re.search(r"^# (.+)$", (docs / f"{page}.md").read_text("utf-8"), re.M)
        assert heading is not None, f"docs/{page}.md has no title"
        found[page] = heading[1]
    return found


def _write(app: Sphinx) -> None:
    docs = Path(app.srcdir)
    folder = docs / "reference"
    known = groups(folder)
    titles = titles_of(docs, {group.page for group in known})
    pages = {f"{name}.md": page_of(name, group, titles) for group in known for name in group.names}
    pages.update({f"{group.slug}.md": page_of_group(group, titles) for group in known})
    pages["_names.md"] = all_groups(known)
    pages["_options.md"] = all_options([name for group in known if group.options for name in group.names])
    api = folder / "api"
    api.mkdir(exist_ok=True)
    for stale in set(api.glob("*.md")) - {api / name for name in pages}:
        stale.unlink()
    for name, text in pages.items():
        path = api / name
        if not path.exists() or path.read_text("utf-8") != text:
            path.write_text(text, "utf-8")


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the step with Sphinx, before it looks for pages."""
    app.connect("builder-inited", _write)
    return {"parallel_read_safe": True}
