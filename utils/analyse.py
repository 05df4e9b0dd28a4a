"""The old name of `python -m report.analyse`, for command lines that use it."""

import runpy

if __name__ == "__main__":
    runpy.run_module("report.analyse", run_name="__main__")
