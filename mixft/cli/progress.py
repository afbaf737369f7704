"""What is seen while a command works: a live bar on a terminal, a line at every tenth elsewhere."""

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text


def describe(event: dict) -> str:
    """Loss, accuracy, learning rate, loss scale and rate of one ``step`` event, in one line."""
    loss = "nan" if event["loss"] is None else f"{event['loss']:.3f}"
    parts = [f"loss {loss}", f"accuracy {event['accuracy']:.1%}", f"lr {event['learning_rate']:.1e}"]
    if event["loss_scale"] is not None:
        parts.append(f"scale {event['loss_scale']:g}")
    parts.append(f"{event['tokens_per_second']:,.0f} tokens/s")
    return "  ".join(parts)


class TwoLines(Progress):
    """The bar, and what is measured on a line of its own below it: together they would not fit a terminal's width."""

    def get_renderables(self):
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text("  " + task.fields["state"], no_wrap=True)


class RunProgress:
    """Shows the events of one run; a context manager around it.

    Args:
        console: where to; its ``is_terminal`` decides between the bar and the lines.
        name: the run's name, such as ``int8 seed 1``.
    """

    def __init__(self, console: Console, name: str):
        self.console = console
        self.name = name
        self.steps = 0
        self.tenth = 0
        self.bar = None
        if console.is_terminal:
            self.bar = TwoLines(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                console=console,
            )
            self.task = self.bar.add_task(name, total=None, state="starting")

    def __enter__(self) -> "RunProgress":
        if self.bar is not None:
            self.bar.start()
        return self

    def __exit__(self, *exception) -> None:
        if self.bar is not None:
            self.bar.stop()

    def on_event(self, event: dict) -> None:
        if event["event"] == "start":
            self.steps = event["steps"]
            if self.bar is not None:
                self.bar.reset(self.task, total=self.steps)
        elif event["event"] == "step":
            self._show(describe(event), event["step"])
        elif self.bar is not None:
            self.bar.update(self.task, state=event["name"])

    def _show(self, state: str, step: int) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=step, state=state)
        elif step * 10 // self.steps > self.tenth:
            self.tenth = step * 10 // self.steps
            self.console.print(f"{self.name}  {step}/{self.steps}  {state}", soft_wrap=True, highlight=False)


class ByteProgress:
    """Progress by bytes: a live bar on a terminal, a line at every tenth elsewhere. A context manager."""

    def __init__(self, name: str, total: int):
        self.name = name
        self.console = Console(stderr=True)
        self.total = max(1, total)
        self.done = 0
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.task = self.bar.add_task(name, total=self.total)

    def __enter__(self) -> "ByteProgress":
        self.bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self.bar.stop()

    def advance(self, count: int) -> None:
        tenth = self.done * 10 // self.total
        self.done += count
        self.bar.update(self.task, completed=self.done)
        if not self.console.is_terminal and self.done * 10 // self.total > tenth:
            self.console.print(f"{self.name}  {self.done:,} of {self.total:,} bytes", highlight=False)
