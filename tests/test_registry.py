"""Names in a configuration become objects: shipped ones, and those of a user's module."""

from __future__ import annotations

import sys

import pytest

from oprd.registry import resolve_object, resolve_with_arguments

KNOWN = {"alpha": 1, "beta": 2}


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A user's package on sys.path, `users_code.parts`, with a `Widget`, and modules that fail when they are imported."""
    package = tmp_path / "users_code"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "parts.py").write_text("class Widget:\n    pass\n")
    (package / "raises.py").write_text("1 / 0\n")
    (package / "half.py").write_text("def f(:\n")
    (package / "needs.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield package
    for name in [n for n in sys.modules if n.partition(".")[0] == "users_code"]:
        del sys.modules[name]


def test_a_shipped_name():
    assert resolve_object("part", "beta", KNOWN) == 2


def test_a_name_of_the_users_own(module):
    found = resolve_object("part", "users_code.parts:Widget", KNOWN)
    assert found is sys.modules["users_code.parts"].Widget


def test_an_unknown_name_lists_what_is_allowed_and_the_nearest():
    with pytest.raises(ValueError, match=r"^part: 'beto' is not one of alpha, beta, nor module:attribute .* 'beta'\?$"):
        resolve_object("part", "beto", KNOWN)
    with pytest.raises(ValueError, match=r"not one of alpha, beta, nor module:attribute of your own code$"):
        resolve_object("part", "quite.other", KNOWN)


@pytest.mark.parametrize(
    "name", ["users_code:", ":Widget", "users_code:a:b", "a b:c", "../x:y", "users_code:a.b", ".x:y"]
)
def test_another_form_is_refused_and_nothing_imported(module, name):
    with pytest.raises(ValueError, match=r"part: .* is not of the form module:attribute.*alpha, beta"):
        resolve_object("part", name, KNOWN)
    assert "users_code" not in sys.modules


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_module_here:X", r"module no_such_module_here, .*ModuleNotFoundError: No module named.*PYTHONPATH$"),
        ("users_code.absent:X", r"module users_code\.absent, which cannot be imported .*PYTHONPATH$"),
        ("users_code.needs:X", r"module users_code\.needs, .*No module named 'no_such_dependency'"),
        ("users_code.raises:X", r"module users_code\.raises, .*ZeroDivisionError: division by zero"),
        ("users_code.half:X", r"module users_code\.half, .*SyntaxError"),
        ("users_code.parts:Widgett", r"users_code\.parts \(.*parts\.py\) has no attribute 'Widgett'; did you mean 'Widget'\?"),
        ("users_code.parts:zzz", r"has no attribute 'zzz'; is another module users_code\.parts earlier on PYTHONPATH\?"),
    ],
)  # fmt: skip
def test_what_cannot_be_imported_is_one_sentence(module, name, message):
    with pytest.raises(ValueError, match=f"^part: .*{message}") as caught:
        resolve_object("part", name, KNOWN)
    assert "\n" not in str(caught.value)


def test_a_mapping_gives_arguments_too(module):
    entry = {"use": "users_code.parts:Widget", "size": 3}
    assert resolve_with_arguments("part", entry, KNOWN) == (sys.modules["users_code.parts"].Widget, {"size": 3})
    assert entry == {"use": "users_code.parts:Widget", "size": 3}
    assert resolve_with_arguments("part", {"use": "alpha"}, KNOWN) == (1, {})
    assert resolve_with_arguments("part", "alpha", KNOWN) == (1, {})


@pytest.mark.parametrize("entry", [{}, {"name": "alpha"}, {"use": 3}, {"use": "alpha", 3: 4}, None, ["alpha"]])
def test_what_is_no_mapping_of_that_form_is_refused(entry):
    with pytest.raises(ValueError, match=r"part: .*\{use: name, argument: value, …\}; name is one of alpha, beta"):
        resolve_with_arguments("part", entry, KNOWN)
