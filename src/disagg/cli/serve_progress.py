"""The display of ``disagg serve`` on a terminal: a progress bar for each instance that loads, and a table."""

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from disagg.base.ids import InstanceId
from disagg.base.messages import InstanceFacts
from disagg.cli.serve_display import PlainDisplay, instance_columns, instance_row
from disagg.serve.router.interface import InstanceStatus


class ProgressDisplay(PlainDisplay):
    """A PlainDisplay with bars instead of lines while instances load. The bars go when all are done."""

    def __init__(self, *, as_json: bool, started_s: float) -> None:
        super().__init__(as_json=as_json, started_s=started_s)
        self._console = Console(stderr=True, highlight=False)
        self._progress = Progress(
            TextColumn("{task.fields[instance]:<12}"),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        self._tasks: dict[InstanceId, TaskID] = {}

    def instance_loading(self, instance: InstanceId, stage: str, fraction: float) -> None:
        """See ServerObserver."""
        if instance not in self._tasks:
            self._tasks[instance] = self._progress.add_task(stage, total=1.0, instance=instance)
            self._progress.start()
        self._progress.update(self._tasks[instance], completed=fraction, description=stage)

    def instance_ready(self, instance: InstanceId, facts: InstanceFacts) -> None:
        """See ServerObserver."""
        self._remove(instance)
        super().instance_ready(instance, facts)

    def instance_lost(self, instance: InstanceId, how: str, restart_in_s: float | None) -> None:
        """See ServerObserver."""
        self._remove(instance)
        super().instance_lost(instance, how, restart_in_s)

    def instance_left(self, instance: InstanceId) -> None:
        """See ServerObserver."""
        self._remove(instance)
        super().instance_left(instance)

    def show_instances(self, instances: tuple[InstanceStatus, ...]) -> None:
        """Show a table."""
        table = Table(*instance_columns(), box=None, pad_edge=True, header_style="bold")
        for status in instances:
            table.add_row(*instance_row(status))
        self._console.print(table)

    def close(self) -> None:
        """Take the bars away."""
        self._progress.stop()

    def _remove(self, instance: InstanceId) -> None:
        task = self._tasks.pop(instance, None)
        if task is not None:
            self._progress.remove_task(task)
        if not self._tasks:
            self._progress.stop()
