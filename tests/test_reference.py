"""Every public name has an entry in the reference, and a docstring with the sections of a reference page."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import tomllib
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from test_words import VERB

LISTED = Path(__file__).resolve().parents[1] / "docs" / "reference" / "names.toml"
GROUPS = tomllib.loads(LISTED.read_text(encoding="utf-8"))["group"]
NAMES = [name for group in GROUPS for name in group["names"]]
PACKAGES = (
    "xent",
    "xent.auditing",
    "xent.cli",
    "xent.curvature",
    "xent.data",
    "xent.errors",
    "xent.integrations",
    "xent.integrations.lightning",
    "xent.integrations.transformers",
    "xent.integrations.trl",
    "xent.linear_model",
    "xent.metrics",
    "xent.nn",
    "xent.sinkhorn",
    "xent.triplets",
    "xent.verify",
)
ORDER = ("Args", "Attributes", "Returns", "Raises", "Example")
METHODS_OF_TORCH = ("extra_repr",)  # which torch calls and describes
HEADING = re.compile(r"^([A-Z]\w+):$", re.M)
ARGUMENTS = re.compile(r" {4}(\*{0,2}\w+(?:, \*{0,2}\w+)*): \S")
FIELD = re.compile(r"^    (\w+): [^#\n]+  # \S", re.M)


class Exemption(NamedTuple):
    """Sections that a docstring need not have."""

    sections: tuple[str, ...]
    of: typing.Callable[[Any], bool]
    why: str


EXEMPT = (
    Exemption(("Returns",), inspect.isclass, "a class returns its instance"),
    Exemption(("Returns",), lambda thing: returned(thing) in (None, "None"), "None is not described"),
    Exemption(("Args", "Raises"), lambda thing: is_error(thing), "the message is the library's to write"),
    Exemption(("Args", "Raises"), lambda thing: bool(fields(thing)), "each field has a comment behind it"),
    Exemption(("Args", "Raises"), lambda thing: not parameters(thing), "it takes nothing"),
)


def found(name: str) -> Any:
    """Return the object of a name in full."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def is_error(thing: Any) -> bool:
    return inspect.isclass(thing) and issubclass(thing, BaseException)


def returned(thing: Any) -> Any:
    """Return the annotation of what a function returns."""
    return inspect.signature(thing).return_annotation if inspect.isfunction(thing) else thing


def parameters(thing: Any) -> list[str]:
    """Return the parameters of a function, or of the constructor of a class."""
    if typing.is_typeddict(thing):
        return fields(thing)
    return [name for name in inspect.signature(thing).parameters if name not in ("self", "cls")]


def fields(thing: Any) -> list[str]:
    """Return the public fields of a named tuple, a dataclass or a typed dictionary."""
    if dataclasses.is_dataclass(thing):
        return [field.name for field in dataclasses.fields(thing) if field.name[0] != "_"]
    return list(thing.__annotations__ if typing.is_typeddict(thing) else getattr(thing, "_fields", ()))


def needed(thing: Any) -> set[str]:
    """Return the sections that a function or a class must have."""
    every = {"Args", "Returns", "Raises", "Example"}
    for exemption in EXEMPT:
        if not every.isdisjoint(exemption.sections) and exemption.of(thing):
            every -= {*exemption.sections}
    return every


def sections(docstring: str) -> dict[str, str]:
    """Return the sections of a docstring in the style of Google, by their headings; "" is what precedes."""
    opening, *parts = HEADING.split(inspect.cleandoc(docstring))
    return {"": opening.strip(), **dict(zip(parts[::2], parts[1::2], strict=True))}


def described(section: str) -> Iterator[str]:
    """Yield the names that a section of arguments describes; a line that names none, as it is.

    The names of an entry stand on one line, where Sphinx looks for them.
    """
    for line in section.splitlines():
        if line and not line.startswith(" " * 5):
            match = ARGUMENTS.match(line)
            yield from (name.strip("*") for name in match[1].split(", ")) if match else [line]


def faults(thing: Any) -> Iterator[str]:
    """Yield what the docstring of a public function or class lacks."""
    have = sections(vars(thing).get("__doc__") or thing.__doc__ or "")
    for section in needed(thing) - have.keys():
        yield f"there is no section {section}"
    titles = [title for title in have if title]
    if titles != [title for title in ORDER if title in titles]:
        yield f"the sections are {', '.join(titles)}; there are, in this order, {', '.join(ORDER)}"
    if ">>> " not in have.get("Example", ">>> "):
        yield "the example is none that doctest runs"
    if inspect.isfunction(thing) != bool(VERB.match(have[""])):
        yield "a function opens with a verb, a class with a noun"
    yield from faults_of_arguments(thing, have)
    if inspect.isclass(thing):
        commented = FIELD.findall(inspect.getsource(thing)) if fields(thing) else []
        yield from (f"field {field} has no comment" for field in fields(thing) if field not in commented)
        yield from faults_of_methods(thing)


def faults_of_arguments(thing: Any, have: dict[str, str]) -> Iterator[str]:
    """Yield what a section of arguments lacks, or has too much."""
    if "Args" in have:
        names = list(described(have["Args"]))
        for parameter in parameters(thing):
            if names.count(parameter) != 1:
                yield f"argument {parameter} is described {names.count(parameter)} times"
        yield from (f"there is no argument {name}" for name in names if name not in parameters(thing))


def faults_of_methods(thing: type) -> Iterator[str]:
    """Yield what the public methods and properties of a class lack, those of its bases in xent among them."""
    for base in thing.__mro__:
        for name, method in vars(base).items() if base.__module__.startswith(("xent", __name__)) else ():
            method = getattr(method, "__func__", method)
            if name[0] == "_" or name in METHODS_OF_TORCH:
                continue
            if isinstance(method, property | types.FunctionType) and not method.__doc__:
                yield f"{name} of {base.__name__} has no docstring"
            elif isinstance(method, types.FunctionType):
                for fault in faults_of_arguments(method, sections(method.__doc__ or "")):
                    yield f"{name}: {fault}"


def test_every_public_name_is_in_the_reference():
    """A name that is public in several packages is there once."""
    listed = {id(found(name)) for name in NAMES}
    for package in PACKAGES:
        module = importlib.import_module(package)
        things = {name: getattr(module, name) for name in set(module.__all__) - {"__version__"}}
        missing = [
            name for name, thing in things.items() if not inspect.ismodule(thing) and id(thing) not in listed
        ]
        assert missing == [], f"names of {package} that {LISTED.name} lacks"


def test_every_name_of_the_reference_is_there_once():
    assert len({id(found(name)) for name in NAMES}) == len(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_docstring_makes_a_reference_page(name):
    thing = found(name)
    if inspect.isfunction(thing) or inspect.isclass(thing):
        assert list(faults(thing)) == []
    else:  # a constant has no docstring of its own, but the string below it in the package that is named
        module, _, attribute = name.rpartition(".")
        source = inspect.getsource(importlib.import_module(module))
        assert re.search(rf'^{attribute} = .*\n"""\w', source, re.M)


@pytest.mark.parametrize("exemption", EXEMPT, ids=lambda exemption: exemption.why)
def test_an_exemption_is_of_use(exemption):
    things = [thing for thing in map(found, NAMES) if inspect.isfunction(thing) or inspect.isclass(thing)]
    assert any(exemption.of(thing) and not {*exemption.sections} & needed(thing) for thing in things)


def lacking(a: int, b: int) -> int:
    """Nothing is said well.

    Args:
        a,
            b: two lines.
        c: no argument.

    Example:
        lacking(1, 2)

    Raises:
        ValueError: never.
    """


class Lacking(NamedTuple):
    """Return a class."""

    one: int
    two: int  # commented

    def method(self): ...


def test_faults_are_found():
    assert sorted(fault.partition(";")[0] for fault in faults(lacking)) == [
        "a function opens with a verb, a class with a noun",
        "argument a is described 0 times",
        "argument b is described 0 times",
        "the example is none that doctest runs",
        "the sections are Args, Example, Raises",
        "there is no argument     a,",
        "there is no argument c",
        "there is no section Returns",
    ]
    assert sorted(faults(Lacking)) == [
        "a function opens with a verb, a class with a noun",
        "field one has no comment",
        "method of Lacking has no docstring",
        "there is no section Example",
    ]
