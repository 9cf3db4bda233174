"""Write every stored fixture of tests/data again: run main() of each scripts/fixtures_*.py.

Run: python scripts/make_fixtures.py (needs the extra `parity`). Each script says in its docstring
what it stores and how that was made.
"""

from importlib import import_module
from pathlib import Path

if __name__ == "__main__":
    for file in sorted(Path(__file__).parent.glob("fixtures_*.py")):
        print(file.stem)
        import_module(file.stem).main()
