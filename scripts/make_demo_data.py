"""Compile the fact tables of dataset/facts into the demo data: every training format, each with a held-out split.

    python scripts/make_demo_data.py [--out_dir dataset/demo] [--seed 0]

What it writes is the work of dataset/demo_data.py; the same seed gives the same bytes.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.demo_data import DEFAULT_OUT, make_demo_data
from dataset.demo_templates import LANGUAGES
from model.errors import run_script


def print_report(out_dir: Path, manifest: dict) -> None:
    """One line a file, one line a relation with its facts in each language."""
    print(f"{'file':28}{'rows':>8}{'KiB':>8}")
    for name, entry in manifest["files"].items():
        print(f"{name:28}{entry['rows']:8}{entry['bytes'] / 1024:8.0f}")
    counts = manifest["items_by_relation"]
    print(f"\n{'relation':28}" + "".join(f"{language:>8}" for language in LANGUAGES))
    for name in dict.fromkeys(key.split()[0] for key in counts):
        print(f"{name:28}" + "".join(f"{counts.get(f'{name} {language}', 0):8}" for language in LANGUAGES))
    print(f"\n{manifest['facts']} facts, {manifest['items']} counted once a language, in {out_dir}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out_dir", type=Path, default=DEFAULT_OUT, help="folder for the files (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed gives another order and choice of phrasings")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def main(args: argparse.Namespace) -> None:
    print_report(args.out_dir, make_demo_data(args.out_dir, args.seed))


if __name__ == "__main__":
    run_script(parse_args, main)
