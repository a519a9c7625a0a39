import doctest
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from torch import nn

import bn_insert


def modules() -> Iterator[ModuleType]:
    for module in pkgutil.walk_packages(bn_insert.__path__, "bn_insert."):
        if not module.name.endswith("__main__"):
            yield importlib.import_module(module.name)


def documented() -> Iterator[tuple[str, str, ModuleType]]:
    """Yield name, docstring and module of each function, class and method with an example.

    doctest's own finder skips functions that are wrapped by the run-time type check.
    """
    for module in modules():
        for name, value in vars(module).items():
            own = getattr(value, "__module__", None) == module.__name__
            if own and (inspect.isfunction(value) or inspect.isclass(value)):
                members = vars(value).items() if inspect.isclass(value) else ()
                for path, docstring in [
                    (name, value.__doc__),
                    *((f"{name}.{key}", getattr(member, "__doc__", None)) for key, member in members),
                ]:
                    if isinstance(docstring, str) and ">>>" in docstring:
                        yield f"{module.__name__}.{path}", docstring, module


EXAMPLES = {name: (docstring, module) for name, docstring, module in documented()}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_in_a_docstring_print_what_they_show(name: str) -> None:
    docstring, module = EXAMPLES[name]
    test = doctest.DocTestParser().get_doctest(
        inspect.cleandoc(docstring), {"torch": torch, "nn": nn, **vars(module)}, name, None, None
    )
    output: list[str] = []
    result = doctest.DocTestRunner().run(test, out=output.append)
    assert result.failed == 0, "".join(output)
    assert result.attempted > 0


@pytest.mark.parametrize(
    "name",
    [
        "graph.sites.find_sites",
        "batchnorm.identity_parameters.identity_batchnorm",
        "surgery.insert.insert_batchnorm",
        "compare.outputs.compare_outputs",
    ],
)
def test_the_main_functions_show_an_example(name: str) -> None:
    assert f"bn_insert.{name}" in EXAMPLES


@pytest.mark.parametrize("name", bn_insert.__all__)
def test_every_public_name_has_a_docstring(name: str) -> None:
    assert inspect.getdoc(getattr(bn_insert, name))


def public_docstrings() -> Iterator[tuple[str, str]]:
    for name in bn_insert.__all__:
        value = getattr(bn_insert, name)
        members = [
            (key, member)
            for key, member in (vars(value).items() if inspect.isclass(value) else ())
            if inspect.isfunction(member) or isinstance(member, property)
        ]
        for path, documented in [(name, value), *((f"{name}.{key}", member) for key, member in members)]:
            if not path.split(".")[-1].startswith("_") and isinstance(documented.__doc__, str):
                yield path, inspect.cleandoc(documented.__doc__)


def test_examples_of_public_names_are_in_a_section_that_the_documentation_formats_as_code() -> None:
    shown_as_text = [
        name
        for name, docstring in public_docstrings()
        if ">>>" in docstring and "Examples:" not in docstring.partition(">>>")[0].splitlines()
    ]
    assert shown_as_text == []
