"""Set up Raylight from a fresh clone, and run its demo or its tests. Needs only Python 3.10 or later.

    python3 raylight/dev/setup/bootstrap.py [--comfyui RELEASE] COMMAND [arguments]

    setup           set up: a ComfyUI, an environment in .venv, a link in that ComfyUI's custom_nodes
    demo [...]      set up, then run the demo with these arguments
    test [...]      set up, then run pytest with these arguments, without slow tests unless an argument selects
                    tests: a path in tests/, -k, -m, --last-failed
    test-all [...]  the same with slow tests
    smoke [...]     set up, then run a few tests that show whether a release of ComfyUI works at all
    check           set up, then say what of ComfyUI is gone that Raylight stands on
    test-gpu [...]  set up, then run the tests that need GPUs, on all that PyTorch sees
    lint [...]      set up, then run ruff check with these arguments
    format [...]    set up, then run ruff format with these arguments
    types [...]     set up, then check types with these arguments
    workflows       set up, then write the templates in example_workflows
    versions        set up, then write the installed versions to tests/versions.txt
    comfyui-path    print which ComfyUI is used

The ComfyUI is that of $COMFYUI_PATH, or the one whose custom_nodes/ holds this checkout, or a downloaded copy. With
--comfyui 0.24 (0.27, 0.30) it is a copy of that release; packages that it needs in other versions than those in .venv
go into .venv-0.24. check does so for the ComfyUI of $COMFYUI_PATH too, and changes nothing in .venv or in that ComfyUI.
A second run finds everything in place and does nothing.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

if __package__ in (None, ""):
    # Run as a file: Python put this directory on the path instead of the checkout's root.
    sys.path[0] = str(Path(__file__).resolve().parents[3])

from raylight.dev.setup import comfyui, environment, overlay
from raylight.dev.setup.child import run_child
from raylight.dev.setup.link import check_place, link_into
from raylight.dev.setup.report import SetupError, say
from raylight.driver.preflight import MINIMUM

MINIMUM_PYTHON = (3, 10)
COMMANDS = {
    "setup": None,
    "demo": ["-m", "raylight.dev.demo"],
    "test": ["-m", "pytest", "-q"],
    "test-all": ["-m", "pytest", "-q"],
    "smoke": ["-m", "pytest", "-q", "-m", "smoke"],
    "check": ["-m", "raylight.dev.check"],
    "test-gpu": ["-m", "pytest", "-q", "-rs", "tests/gpu"],
    "lint": ["-m", "ruff", "check"],
    "format": ["-m", "ruff", "format"],
    "types": ["-m", "basedpyright"],
    "workflows": ["-m", "raylight.dev.workflows"],
    "versions": ["tests/support/versions.py"],
}

TESTS = ("test", "test-all", "smoke")
CHOICES = ("-k", "-m", "--lf", "--last-failed")
"""Options that select tests: with one of them, slow tests are not left out."""


def main(arguments: list[str]) -> int:
    """Run one command, as described in the module's docstring, and return its exit code."""
    release = ""
    if arguments[:1] == ["--comfyui"]:
        release, arguments = "".join(arguments[1:2]), arguments[2:]
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command in ("-h", "--help", "help"):
        print(__doc__)
        return 0
    if command not in (*COMMANDS, "comfyui-path") or (rest and command in ("setup", "check", "comfyui-path")):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        check_python(sys.version_info[:2])
        if release:
            check_release(release, os.environ)
        checkouts = comfyui.checkout_paths(__file__, os.environ)
        if command == "comfyui-path":
            print(found_comfyui(checkouts).root)
            return 0
        if command == "check" and os.environ.get(comfyui.VARIABLE):
            host, env = set_up_own(checkouts)
        else:
            host, env = set_up(checkouts)
        if release:
            host, env = set_up_release(checkouts[0], release, host, env)
    except SetupError as error:
        print(f"\nraylight: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nraylight: interrupted; run the same command again to continue", file=sys.stderr)
        return 130
    program = COMMANDS[command]
    if program is None:
        return 0
    if command in TESTS:
        named = any(names_tests(argument, checkouts[0]) for argument in rest)
        if command == "test" and not named and not any(argument.startswith(CHOICES) for argument in rest):
            say("tests marked slow are left out: `make test-all` runs them too")
            program = [*program, "-m", "not slow"]
        if not named:
            # pytest finds its configuration only through a path inside tests/.
            program = [*program, "tests"]
    variables = {**os.environ, comfyui.VARIABLE: str(host.root)}
    if command == "types":  # it asks this Python, with this path, where ComfyUI and the packages are
        program = [*program, "--pythonpath", str(env.python)]
        variables["PYTHONPATH"] = str(host.root)
    return run_child([str(env.python), *program, *rest], cwd=checkouts[0], environ=variables)


def check_python(version: tuple[int, ...]) -> None:
    if version < MINIMUM_PYTHON:
        have, need = (".".join(map(str, numbers)) for numbers in (version, MINIMUM_PYTHON))
        raise SetupError(f"this is Python {have}, but {need} or later is needed. Run it with such a Python.")


def check_release(release: str, environ: Mapping[str, str]) -> None:
    comfyui.pinned(release)
    if environ.get(comfyui.VARIABLE):
        raise SetupError(
            f"COMFYUI = {release} names a release of ComfyUI, but {comfyui.VARIABLE} names yours in "
            f"{environ[comfyui.VARIABLE]}: unset one of them."
        )


def names_tests(argument: str, checkout: Path) -> bool:
    """Return whether a pytest argument is a path in tests/, such as tests/setup or tests/setup/test_link.py::test_x."""
    path = os.path.realpath(checkout / argument.split("::")[0])
    return os.path.exists(path) and checkout / "tests" in Path(path).parents


def found_comfyui(checkouts: list[Path]) -> comfyui.ComfyUI:
    found = comfyui.find(checkouts, os.environ)
    if found is None:
        raise SetupError(f"there is no ComfyUI yet. Run the command setup, or set {comfyui.VARIABLE} to your own.")
    return found


def set_up(
    checkouts: list[Path], environ: Mapping[str, str] | None = None
) -> tuple[comfyui.ComfyUI, environment.Environment]:
    """Set up all that the demo and the tests need. Cheap if it is already there."""
    checkout = checkouts[0]
    say(f"Python {'.'.join(map(str, sys.version_info[:3]))}")
    # Before pip takes minutes: COMFYUI_PATH may be wrong.
    host = comfyui.find(checkouts, os.environ if environ is None else environ)
    if host is not None:
        check_place(host.root, checkout)  # likewise
    env = environment.Environment(checkout / ".venv")
    environment.create(env)
    host = host or comfyui.fetch(checkout, env.python)
    note = "" if host.is_supported else f", older than {MINIMUM}, which Raylight is made for"
    say(f"ComfyUI {host.version} {host.origin}: {host.root}{note}")
    changed = environment.install(env, environment.requirements(env, checkout, host.root))
    say(f"the environment {env.root} is {'complete now' if changed else 'up to date'}")
    link(host, checkout)
    return host, env


def set_up_release(
    checkout: Path, release: str, host: comfyui.ComfyUI, env: environment.Environment
) -> tuple[comfyui.ComfyUI, environment.Environment]:
    """Set up a copy of that release with an environment over `env`, unless `host` already is that copy."""
    version = comfyui.pinned(release)
    root = comfyui.cached_root(checkout, version)
    if root == host.root:
        return host, env
    if comfyui.looks_like_comfyui(root):
        copy = comfyui.ComfyUI(root, "unpacked here")
    else:
        copy = comfyui.fetch(checkout, env.python, version)
    say(f"ComfyUI {copy.version} {copy.origin}: {copy.root}")
    over = environment_over(checkout, env, copy)
    link(copy, checkout)
    return copy, over


def set_up_own(checkouts: list[Path]) -> tuple[comfyui.ComfyUI, environment.Environment]:
    """Set up an environment for the ComfyUI of $COMFYUI_PATH over the one of `set_up` without it, which stays as it is.

    Raises SetupError: it is not a ComfyUI.
    """
    own = comfyui.find(checkouts, os.environ)
    assert own is not None
    _, env = set_up(checkouts, {})
    say(f"ComfyUI {own.version} {own.origin}: {own.root}")
    return own, environment_over(checkouts[0], env, own)


def environment_over(checkout: Path, env: environment.Environment, host: comfyui.ComfyUI) -> environment.Environment:
    """Set up an environment over `env` with what a ComfyUI wants in other versions."""
    over = overlay.create_over(env, overlay.overlay_root(checkout, host.version))
    what = f"what ComfyUI {host.version} wants in other versions (0.5 GB, less than a minute)"
    changed = environment.install(over, overlay.requirements_over(env, host.root), what)
    say(f"the environment {over.root} is {'complete now' if changed else 'up to date'}")
    return over


def link(host: comfyui.ComfyUI, checkout: Path) -> None:
    entry, made = link_into(host.root, checkout)
    say(f"this checkout is {'now ' if made else ''}among ComfyUI's custom nodes: {entry}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
