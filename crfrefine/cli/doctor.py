"""`crfrefine doctor`: what this machine offers, and what is missing for what."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from crfrefine.base.text import for_terminal, printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from crfrefine.apps.tools.doctor import Gpu, Report
    from crfrefine.apps.tools.extras import Extra


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Everything, for programs and for reports of faults.")] = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Show where an unexpected error was raised.")] = False,
) -> None:
    """Show what this machine offers, and what is missing for what."""
    from crfrefine.apps.tools.doctor import examine

    report = examine()
    if as_json:
        import json

        print(json.dumps(report.to_dict(), indent=2))
    else:
        _show(report)
    if report.engine.traceback is not None and verbose:
        from crfrefine.cli.progress import print_traceback

        print_traceback(report.engine.traceback)
    if report.engine.error is not None:
        raise typer.Exit(1)


def _show(report: Report) -> None:
    print(f"crfrefine {report.version}")
    for name, text in _machine(report):
        print(for_terminal(f"  {name:<11}  {text}"))
    print("packages")
    for package in report.installation.required:
        print(for_terminal(f"  {package.name:<11}  {package.problem or package.version}"))
    print("extras")
    for extra in report.installation.extras:
        print(for_terminal(f"  {extra.name:<11}  {_extra(extra)}"))
    to_do = report.to_do()
    print("to do" if to_do else "to do: nothing")
    for number, text in enumerate(to_do, start=1):
        print(for_terminal(f"  {number}. {text}"))


def _machine(report: Report) -> Iterator[tuple[str, str]]:
    """Yield the facts about machine and process, as pairs of name and value for display."""
    from crfrefine.base.memory import format_size

    yield "package", printable(report.package)
    yield "Python", f"{report.python['version']}, {printable(report.python['path'])}"
    yield "system", report.system
    engine = report.engine
    if engine.error is None:
        is_best = engine.level == engine.processor_level
        best = "the best for this processor" if is_best else f"while this processor supports {engine.processor_level}"
        yield "engine", f"runs as {engine.level}, {best}: {report.processor}; compiled for {', '.join(engine.levels)}"
    else:
        yield "engine", f"does not run on this processor, {report.processor}"
    yield "cores", f"{report.cores['number']}: {report.cores['source']}"
    memory = report.memory["bytes"]
    yield "memory", report.memory["source"] if memory is None else f"{format_size(memory)}: {report.memory['source']}"
    soft, hard = ("no limit" if limit is None else str(limit) for limit in report.open_files.values())
    yield "open files", f"{soft} (ulimit -n), at most {hard}"
    space = report.temporary
    if space.folder is not None and space.free is not None:
        yield "temporary", f"{printable(space.folder)}, {format_size(space.free)} free"
    yield "GPU", _gpu(report.gpu)
    yield "programs", ", ".join(f"{name} {'found' if path else 'not found'}" for name, path in report.programs.items()) + "; all optional"
    for name, value in report.environment.items():
        yield "environment", f"{name}={printable(value)}"


def _gpu(gpu: Gpu) -> str:
    from crfrefine.base.memory import format_size

    if gpu.properties is None:
        return gpu.error or "none"
    found = gpu.properties
    more = f", and {gpu.number - 1} more" if gpu.number > 1 else ""
    driver, runtime = (f"{found[name] // 1000}.{found[name] % 1000 // 10}" for name in ("driver", "runtime"))
    versions = f"driver for CUDA {driver}, CUDA {runtime}, CuPy {found['cupy']}"
    return f"{found['name']}, {format_size(found['memory'])}, compute capability {found['compute_capability']}, {versions}{more}"


def _extra(extra: Extra) -> str:
    installed = ", ".join(f"{package.name} {package.version}" for package in extra.packages if package.fits)
    if extra.is_complete:
        return f"{installed}: {extra.purpose}"
    problems = ", ".join(package.problem for package in extra.packages if package.problem)
    return f"{installed + '; ' if installed else ''}{problems}; for {extra.purpose}: {extra.install}"
