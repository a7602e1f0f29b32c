"""`umarvel JOB CONFIG.yaml [key=value …]`: the command line. Our errors become one line and exit code 2."""

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer

from umarvel_ray import logs
from umarvel_ray.data.check import ImageCheck
from umarvel_ray.errors import UmarvelError
from umarvel_ray.export import Format
from umarvel_ray.runtime.cluster import prepare_environment
from umarvel_ray.storage import at

app = typer.Typer(
    name="umarvel",
    help="Universal multimodal retrieval by the U-MARVEL recipe, on Ray: train, mine, distil, evaluate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

ConfigPath = Annotated[Path, typer.Argument(help="YAML file of settings.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Settings in place of the file's: key.path=value …", show_default=False),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print settings and plan, start nothing.")]


def _job_command(kind: str, help_text: str) -> None:
    def command(config: ConfigPath, overrides: Overrides = None, dry_run: DryRun = False) -> None:
        run_job(kind, config, overrides or [], dry_run=dry_run)

    command.__doc__ = help_text
    app.command(kind, help=help_text)(command)


_job_command("train", "One training stage: data and a checkpoint → the next checkpoint.")
_job_command("embed", "Query sets and pools → embedding stores.")
_job_command("search", "Embedding stores → exact top-k runs, local and global.")
_job_command("evaluate", "A model, stored vectors or runs → results.json and a table.")
_job_command("compare", "Evaluated systems → compare.html: differences with intervals, queries that changed.")
_job_command("report", "Results, curves and mined negatives → report.html.")


@app.command()
def mine(
    config: ConfigPath,
    overrides: Overrides = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Mine nothing; show what each filter would drop and keep.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Runs of the training queries → filtered hard negatives, with counts of all that was dropped."""
    if not explain:
        run_job("mine", config, overrides or [], dry_run=dry_run)
        return
    from umarvel_ray.pipeline.mining import explain as explain_filters
    from umarvel_ray.pipeline.run import load_job

    settings, _ = load_job("mine", config, overrides or [])
    view = _view()
    view.line(f"filters explained: {explain_filters(settings, view)}")


@app.command()
def negatives(
    source: Annotated[Path, typer.Argument(help="What is read.", show_default=False)],
    target: Annotated[Path, typer.Argument(help="What is written.", show_default=False)],
    read: Annotated[str, typer.Option("--from", help="arrow, mbeir, n-tuple, triplet or trec.")] = "arrow",
    write: Annotated[str, typer.Option("--to", help="The same.")] = "mbeir",
    queries: Annotated[Path | None, typer.Option(help="Query file whose neg_cand_list is filled.")] = None,
    qrels: Annotated[Path | None, typer.Option(help="Judgements, for tuples.")] = None,
    root: Annotated[Path | None, typer.Option(help="M-BEIR's: tuples of texts instead of ids.")] = None,
) -> None:
    """Mined negatives from or to M-BEIR's query files, Sentence Transformers' tuples, TREC runs."""
    from umarvel_ray.pipeline.mining import convert_negatives

    done = convert_negatives(source, target, read=read, write=write, queries=queries, qrels=qrels, root=root)
    _view().line(
        f"{target}: {done['negatives']:,} negatives of {done['queries']:,} queries; "
        f"{done['without']:,} queries without"
    )


@app.command()
def rerank(
    config: ConfigPath,
    overrides: Overrides = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Only choose alpha, on val requests; a test split is refused.")
    ] = False,
    dry_run: DryRun = False,
) -> None:
    """Runs → P(Yes) of every hit → fused runs, and the teacher of the distillation."""
    run_job("rerank", config, [*(overrides or []), *(["tune_only=true"] if tune else [])], dry_run=dry_run)


@app.command()
def run(config: ConfigPath, overrides: Overrides = None, dry_run: DryRun = False) -> None:
    """The staged recipe: finished jobs are skipped, an interrupted one goes on."""
    from umarvel_ray.pipeline.only import split_only
    from umarvel_ray.pipeline.run import load_run, run_recipe

    only, overrides = split_only(overrides or [])
    settings = load_run(config, overrides)
    if dry_run:
        from umarvel_ray.pipeline.check import print_plan

        print_plan(settings, _view())
        return
    run_recipe(settings, _view(), only)


@app.command()
def check(
    config: ConfigPath,
    overrides: Overrides = None,
    images: Annotated[ImageCheck, typer.Option(help="How closely pictures are looked at.")] = "exists",
) -> None:
    """Data, settings and outputs of a run: every fault with file and line; nothing is started."""
    from umarvel_ray.pipeline.check import check_run
    from umarvel_ray.pipeline.run import load_run

    faults = check_run(load_run(config, overrides or []), _view(), images=images)
    if faults:
        raise SystemExit(2)


@app.command()
def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    address: Annotated[
        str, typer.Option(envvar="RAY_API_SERVER_ADDRESS", help="The cluster's job server.")
    ] = "http://localhost:8265",
    job: Annotated[str, typer.Option(help="A single job of that kind instead of a whole run.")] = "run",
    detach: Annotated[bool, typer.Option("--detach", help="Do not wait for its end.")] = False,
    attach: Annotated[bool, typer.Option(help="Follow the run if it is on already, or refuse.")] = True,
) -> None:
    """Hand a run to a cluster: packs program and settings, shows its lines, ends with its exit code."""
    from umarvel_ray.pipeline.run import load_job, load_run
    from umarvel_ray.pipeline.submit import submit

    if job == "run":
        settings: Any = load_run(config, overrides or [])
        runtime = settings.runtime
    else:
        settings, runtime = load_job(_known_job(job), config, overrides or [])
    code = submit(job, settings, runtime, _view(), address=address, detach=detach, attach=attach)
    if code:
        raise SystemExit(code)


@app.command()
def status(
    output: Annotated[str, typer.Argument(help="Output of a run or job, or its settings file.")],
    overrides: Overrides = None,
    watch: Annotated[float, typer.Option(help="Print again every so many seconds, until it ends.")] = 0,
) -> None:
    """How a run stands, from its files alone: jobs, rates and time left, while it runs or after."""
    import time

    from umarvel_ray.pipeline.status import output_of, print_status, status_of

    folder = output_of(output, overrides or [])
    while True:
        found = status_of(folder)
        print_status(found, _view())
        if not watch or all(job.state == "finished" for job in found.jobs):
            return
        time.sleep(watch)


@app.command()
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    gpus: Annotated[int | None, typer.Option(help="How many; by default what `runtime` says.")] = None,
    gpu: Annotated[str | None, typer.Option(help="h200, h100, a100 or cpu.")] = None,
    share: Annotated[
        float | None, typer.Option(help="Of the GPU's peak that a model reaches, 0 to 1.")
    ] = None,
    image_tokens: Annotated[float, typer.Option(help="Of an image, where the data is not here.")] = 117,
    rates: Annotated[
        list[str] | None,
        typer.Option(help="Output of an earlier run to take measured rates from; its own by default."),
    ] = None,
) -> None:
    """Work, memory and time of every job before it runs, what holds it up, and how it grows with the pool."""
    from umarvel_ray.pipeline.check import RUN_FILE
    from umarvel_ray.pipeline.run import load_run
    from umarvel_ray.plan.make import Request, make_plan
    from umarvel_ray.plan.show import print_plan

    settings = load_run(config, overrides or [])
    # A run on other machines says nothing about the ones that were asked for, unless the user says it does.
    own = (settings.output,) if not gpu and (at(settings.output) / RUN_FILE).exists() else ()
    learn_from = tuple(rates or ()) or own
    request = Request(gpus=gpus, gpu=gpu, share=share, image_tokens=image_tokens, rates_from=learn_from)
    print_plan(make_plan(settings, request), _view())


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Where world, checkpoints and report go.")] = Path("demo"),
    overrides: Overrides = None,
) -> None:
    """The whole recipe on a small rendered world, in minutes, on two cores: a table and report.html."""
    from umarvel_ray.demo.prepare import RUN_CONFIG, demo_places, load_demo_config, prepare_demo
    from umarvel_ray.model.settings import RERANKER_PROMPTS
    from umarvel_ray.pipeline.run import load_run, run_recipe

    home, view = output.resolve(), _view()
    settings = load_run(RUN_CONFIG, [*demo_places(home), *(overrides or [])])
    with view.bar("drawing the world", 1) as bar:
        if prepare_demo(load_demo_config(), home, prompts=[RERANKER_PROMPTS["plain"]], progress=bar.at):
            view.line(f"[green]✓[/] world and backbone made in {home}")
    run_recipe(settings, view)


@app.command()
def bench(
    name: Annotated[str, typer.Argument(help="Which; `list` names them.", show_default=False)],
    quick: Annotated[bool, typer.Option("--quick", help="Small cases, one round.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Each a fresh process per method.")] = 3,
    case: Annotated[list[str] | None, typer.Option(help="These cases only.", show_default=False)] = None,
    output: Annotated[Path | None, typer.Option(help="Where all figures go, as JSON.")] = None,
) -> None:
    """Speed against named peers: equality first, then ratios with their spread."""
    from umarvel_ray.bench import harness
    from umarvel_ray.bench.view import print_comparisons

    if name == "list":
        for known in harness.names():
            print(f"{known:<12} {harness.load(known).about}")
        return
    view = _view()
    results = harness.run_benchmark(
        name, quick=quick, rounds=rounds, cases=case or [], on_done=lambda line: view.line(f"[dim]{line}[/]")
    )
    print_comparisons(harness.load(name), results, view)
    if output is not None:
        harness.save(results, output, name=name, command=" ".join(["umarvel", *sys.argv[1:]]))
        view.line(f"all figures: {output}")


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="An encoder's checkpoint.", show_default=False)],
    output: Annotated[Path, typer.Argument(help="A new folder.", show_default=False)],
    format: Annotated[Format, typer.Option(help="What others will read it with.", show_default=False)],
    base: Annotated[
        str | None, typer.Option(help="What an adapter was trained on; with peft, the name to give it.")
    ] = None,
) -> None:
    """A checkpoint for others: plain Transformers, one PEFT adapter, or Sentence Transformers."""
    from umarvel_ray.export.formats import export as write

    write(checkpoint, output, format=format, base=base)
    _view().line(f"[green]✓[/] {output}: {format}")


@app.command()
def sweep(
    configs: Annotated[
        list[str],
        typer.Argument(help="Files of experiments, then settings: key.path=value …", show_default=False),
    ],
    dry_run: DryRun = False,
) -> None:
    """Experiments, such as the paper's tables: rows over seeds, what they share computed once."""
    from umarvel_ray.pipeline.sweep import load_sweep, output_of, plan_sweep, run_sweep

    files = [Path(text) for text in configs if "=" not in text]
    overrides = [text for text in configs if "=" in text]
    view = _view()
    sweeps = [load_sweep(file, overrides) for file in files]
    for settings in sweeps:
        places = _demo_places(Path(settings.demo), view, make=not dry_run) if settings.demo else []
        if dry_run:
            cells = plan_sweep(settings, places)
            for folder, job in {output_of(job): job for cell in cells for job in cell.jobs}.items():
                view.line(f"{job.kind:9} {Path(folder).name}")
            continue
        run_sweep(settings, view, places=places)


def _demo_places(home: Path, view: Any, *, make: bool) -> list[str]:
    """Overrides that point a run at the demonstration in `home`, made first where it is missing."""
    from umarvel_ray.demo.prepare import demo_places, load_demo_config, prepare_demo
    from umarvel_ray.model.settings import RERANKER_PROMPTS

    if make:
        with view.bar("drawing the world", 1) as bar:
            prepare_demo(load_demo_config(), home, prompts=[RERANKER_PROMPTS["plain"]], progress=bar.at)
    return demo_places(home)


def run_job(kind: str, config: Path, overrides: list[str], *, dry_run: bool = False) -> None:
    """Run one job from its own settings file; see `umarvel JOB --help`."""
    from umarvel_ray.pipeline.jobs import perform
    from umarvel_ray.pipeline.only import split_only
    from umarvel_ray.pipeline.parts import do_part
    from umarvel_ray.pipeline.run import load_job, print_results

    only, overrides = split_only(overrides)
    settings, runtime = load_job(kind, config, overrides)
    if dry_run:
        from umarvel_ray.pipeline.check import print_settings

        print_settings(settings, _view())
        if kind == "train":
            from umarvel_ray.plan.training import describe_stage

            for line in describe_stage(settings, runtime):
                _view().line(line)
        return
    view = _view()
    if not only.is_everything:
        do_part(kind, settings, runtime, view, only)
        return
    perform(kind, settings, runtime, view)
    if kind in ("compare", "report"):
        view.line(f"page: {settings.output}/{kind}.html")
    if kind == "evaluate":
        print_results([at(settings.output) / "results.json"], view)


def _known_job(kind: str) -> str:
    from umarvel_ray.errors import ConfigError
    from umarvel_ray.pipeline.jobs import JOBS

    if kind not in JOBS:
        raise ConfigError(f"--job {kind}: no such job. Give run, {', '.join(JOBS)}.")
    return kind


def _view() -> Any:
    from umarvel_ray.pipeline.view import View

    return View()


def main(arguments: list[str] | None = None) -> None:
    """Entry point of `umarvel` and of the scripts in `jobs/`."""
    prepare_environment()
    logs.configure()
    _quiet_libraries()
    try:
        ended = app(
            arguments if arguments is not None else sys.argv[1:], prog_name="umarvel", standalone_mode=False
        )
        if ended == 130:  # how Typer answers Ctrl-C
            raise KeyboardInterrupt
    except UmarvelError as error:
        print(f"umarvel: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except typer.Abort:
        raise SystemExit(130) from None
    except KeyboardInterrupt:
        print("umarvel: stopped; the same command goes on from here.", file=sys.stderr)
        raise SystemExit(130) from None
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "format_message"):  # typer's own: a wrong option
            print(f"umarvel: {error.format_message()}", file=sys.stderr)  # type: ignore[attr-defined]
            raise SystemExit(2) from None
        raise


def _quiet_libraries() -> None:
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    # Where it is installed, Accelerate loads DeepSpeed with any model, and it warns that it found no GPU.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    # What another library will drop some day is no news to who trains with it.
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")


if __name__ == "__main__":
    main()
