"""The command line: `tilewright info`, `tilewright demo`, `tilewright bench`.

Nothing heavier than argparse is imported before a command is chosen, so that `--help` answers at once and
`info` can report a broken install.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from tilewright import _families

_ALL, _STORY = "all", "story"
_DEFAULT_TARGETS = {"demo": _STORY, "bench": _ALL}
_EPILOG = """\
examples:
  tilewright info --check          what is installed, built and working here
  tilewright demo                  swap, train, prune and compress one model: what each step gains
  tilewright bench --quick         time the ops beside the libraries that are installed
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0 fine, 1 failed, 2 wrong usage, 130 interrupted."""
    arguments = _with_default_target(list(sys.argv[1:] if argv is None else argv))
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except ImportError as error:
        print(
            f"tilewright: {error}\n`tilewright info` shows what is installed and what is broken.",
            file=sys.stderr,
        )
        return 1
    except (OSError, ValueError) as error:
        print(f"tilewright: {error}", file=sys.stderr)
        return 1


def _with_default_target(arguments: list[str]) -> list[str]:
    """`tilewright demo --quick` means `tilewright demo story --quick`, and bench is that of all families."""
    default = _DEFAULT_TARGETS.get("".join(arguments[:1]))
    if default and (len(arguments) == 1 or _is_option(arguments[1])):
        return [arguments[0], default, *arguments[1:]]
    return arguments


def _is_option(argument: str) -> bool:
    return argument.startswith("-") and argument not in ("-h", "--help")


class _Parser(argparse.ArgumentParser):
    """Argparse's, which names what is nearest to a wrong choice."""

    def error(self, message: str) -> NoReturn:
        """Prints the usage and the message, and exits."""
        found = re.search(r"invalid choice: '(.*)' \(choose from (.*)\)", message)
        near = difflib.get_close_matches(found[1], re.findall(r"[\w-]+", found[2]), n=1) if found else []
        super().error(f"{message}; did you mean {near[0]}?" if near else message)


def _parser() -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = _Parser(
        prog="tilewright",
        description="Handwritten CUDA and C++ kernels for PyTorch: report, demonstration, benchmarks.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"tilewright {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="{info,demo,bench}")
    _add_info(commands)
    _add_demo(commands)
    _add_bench(commands)
    return parser


def _add_info(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("info", help="what is installed, what was built, what works here")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--check", action="store_true", help="also run each op once, against plain torch (about 10 s)"
    )
    parser.set_defaults(run=_run_info)


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="a real model on real text, with and without tilewright",
        epilog="Without a name: the story. Options: tilewright demo NAME --help",
    )
    story = "one model of Mamba and attention layers: swapped, trained, pruned, repaired, compressed"
    words = {_STORY: story, **_words("demo")}
    targets = demo.add_subparsers(dest="target", required=True, metavar="NAME")
    for name, parser in _add_targets(targets, words).items():
        parser.add_argument(
            "--steps", type=_positive, help="training steps (default: the demo's own; fewer with --quick)"
        )
        parser.add_argument(
            "--seed", type=int, default=0, help="seed of the weights and the batches (default 0)"
        )
        parser.add_argument(
            "--quick", action="store_true", help="a few seconds: shows that it runs, not how well it trains"
        )
        parser.add_argument(
            "--out", type=Path, default=Path("tilewright-demo"), help="folder for the plot and the results"
        )
        parser.set_defaults(run=_run_demo, seeds=1)
        if name == "optim":
            parser.add_argument(
                "--seeds",
                type=_positive,
                metavar="K",
                help="repeat for K seeds and report the spread of the loss (default 1)",
            )


def _words(package: str) -> dict[str, str]:
    """What the families of a package are, by name."""
    return {family: _families.FAMILIES[family] for family in _families.present(package)}


def _add_targets(
    targets: argparse._SubParsersAction[argparse.ArgumentParser], words: dict[str, str]
) -> dict[str, argparse.ArgumentParser]:
    """A parser for each name, which stands for itself."""
    return {name: targets.add_parser(name, help=text, description=text) for name, text in words.items()}


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    bench = commands.add_parser(
        "bench",
        help="time the ops beside the peers that are installed",
        epilog="Without a name: all families. Options: tilewright bench NAME --help",
    )
    targets = bench.add_subparsers(dest="target", required=True, metavar="NAME")
    words = _words("bench")
    families = list(words)
    words = {_ALL: f"one after the other: {', '.join(families)}", **words}
    for name, parser in _add_targets(targets, words).items():
        parser.set_defaults(families=families if name == _ALL else [name])
        parser.add_argument(
            "--device", choices=("cpu", "cuda"), help="default: cuda where it works, else cpu"
        )
        parser.add_argument(
            "--quick", action="store_true", help="a few small cases of each family: a minute in all"
        )
        parser.add_argument(
            "--preset", metavar="MODEL", help="sizes of a model, such as llama-8b or mamba-130m"
        )
        parser.add_argument(
            "--peers", type=_names, metavar="A,B", help="only these peers ('none' for ours alone)"
        )
        parser.add_argument(
            "--cases", type=_names, metavar="A,B", help="only cases whose name contains one of these"
        )
        parser.add_argument("--threads", type=_positive, help="CPU threads (default: torch's)")
        parser.add_argument("--list", action="store_true", help="list the cases and stop")
        parser.add_argument(
            "--out", type=Path, default=Path("bench-out"), help="folder for the results (default: bench-out)"
        )
        parser.set_defaults(run=_run_bench)
    compare = targets.add_parser("compare", help="ratios between two result files")
    compare.add_argument("before", type=Path, metavar="A.json")
    compare.add_argument("after", type=Path, metavar="B.json")
    compare.set_defaults(run=_run_compare)


def _run_info(options: argparse.Namespace) -> int:
    from tilewright import _info_command

    return _info_command.run(as_json=options.json, check=options.check)


def _run_demo(options: argparse.Namespace) -> int:
    demo = _families.load("demo", options.target)
    seeds = range(options.seed, options.seed + options.seeds)
    return int(demo.run(options.steps, seeds, options.out, options.quick))


def _run_bench(options: argparse.Namespace) -> int:
    from tilewright.bench import runner

    return runner.run(
        options.families,
        device=options.device,
        quick=options.quick,
        peers=options.peers,
        only=options.cases,
        preset=options.preset,
        threads=options.threads,
        list_only=options.list,
        out=options.out,
    )


def _run_compare(options: argparse.Namespace) -> int:
    from tilewright.bench import compare

    return compare.run(options.before, options.after)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more, got {text!r}")
    return int(text)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _version() -> str:
    from tilewright import __version__

    return __version__
