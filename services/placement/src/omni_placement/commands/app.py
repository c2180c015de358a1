"""The commands in one app."""

import typer

from omni_placement.commands import compare, exchange, plan, ranks, show

app = typer.Typer(
    help="Expert layouts: plan, compare, look at them, and put them in force.\n\n"
    "Loads are tokens per layer and logical expert. Layouts are .npy files, int32 0/1 (ranks, layers, experts), or "
    ".json files, which also keep slots, topology and version.",
    rich_markup_mode="rich",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.command("plan", epilog=plan.EPILOG)(plan.plan)
app.command("compare", epilog=compare.EPILOG)(compare.compare)
app.command("show", epilog=show.EPILOG)(show.show)
app.command("import", epilog=exchange.IMPORT_EPILOG)(exchange.import_)
app.command("export", epilog=exchange.EXPORT_EPILOG)(exchange.export)
app.command("rollback", epilog=ranks.ROLLBACK_EPILOG)(ranks.rollback)
app.command("ranks", epilog=ranks.RANKS_EPILOG)(ranks.ranks)
