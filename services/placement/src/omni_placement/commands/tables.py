"""What commands print of a study."""

from rich.console import Console

from omni_placement.commands.terminal import show_table
from omni_placement.report.study import Measured, Study
from omni_placement.report.summary import above_bound
from omni_placement.report.units import duration, size, times, tokens


def headline(study: Study) -> str:
    topology = study.problem.topology
    hosts = int(topology.hosts[-1]) + 1
    where = f"{topology.num_ranks} ranks" + (f" of {hosts} hosts" if hosts > 1 else "")
    unused = int((~study.is_usable).sum())
    return (
        f"{topology.num_layers} layers × {topology.num_experts} experts on {where}"
        f"{f' ({unused} hold no routed expert)' if unused else ''}, {topology.slots_per_rank} slots each; "
        f"hottest expert {times(float(study.expert_share.max()))} the mean of its layer"
    )


def show_study(study: Study, console: Console) -> None:
    before, after, best = study.before, study.after, study.best_balancedness
    console.print(headline(study), highlight=False, soft_wrap=True)
    console.print()
    shares = before.balancedness, after.balancedness, best
    rows = [
        ("balancedness, mean", *(f"{share.mean():.3f}" for share in shares)),
        ("balancedness, worst layer", *(f"{share.min():.3f}" for share in shares)),
        ("step load, tokens", tokens(before.step_load), tokens(after.step_load), tokens(study.step_bound)),
        ("above the bound", above_bound(study, before), above_bound(study, after), ""),
        ("spare copies", f"{before.copies.sum():,}", f"{after.copies.sum():,}", ""),
    ]
    show_table(("", f"before ({before.name})", f"after ({after.name})", "bound"), rows, console)
    console.print()
    console.print(moves_line(study), highlight=False, soft_wrap=True)
    if after.seconds is not None:
        console.print(f"solved in {duration(after.seconds)}", highlight=False)


def moves_line(study: Study) -> str:
    if study.rounds is None:
        return "some experts are on excluded ranks alone: they must be loaded, not moved"
    weights = f", {size(study.sent_bytes)}" if study.sent_bytes else ""
    return (
        f"to get there: {study.num_sent:,} expert weights sent{weights}, {study.num_between_hosts:,} between hosts, "
        f"{len(study.rounds):,} rounds"
    )


def show_solvers(study: Study, refused: dict[str, str], console: Console) -> None:
    """The least step load first; then the solvers that could not take part, and why."""
    ranked = sorted(study.layouts, key=lambda measured: measured.step_load)
    rows = [_solver(study, measured) for measured in ranked]
    headings = ("solver", "balancedness", "worst layer", "step load", "above bound", "spare copies", "moved", "time")
    show_table(headings, rows, console)
    for name, why in refused.items():
        console.print(f"[dim]{name}: {why}[/]", highlight=False, soft_wrap=True)


def _solver(study: Study, measured: Measured) -> tuple[str, ...]:
    return (
        measured.name,
        f"{measured.balancedness.mean():.4f}",
        f"{measured.balancedness.min():.4f}",
        tokens(measured.step_load),
        above_bound(study, measured),
        f"{measured.copies.sum():,}",
        f"{study.moved(measured):,}",
        "" if measured.seconds is None else duration(measured.seconds),
    )
