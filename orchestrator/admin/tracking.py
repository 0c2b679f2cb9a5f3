"""`fednnunet study track`: a study's curves as TensorBoard event files, for those who look at all their runs there.

Layout: `FOLDER/NAME-ID/SITE/events...` and `FOLDER/NAME-ID/all_sites/events...`, a step is an epoch of a fold.

Rules:

- Read from the journal; written anew each time, so that the files say what the journal says and nothing twice.
- Names of sites and sums; nothing of a case.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from tensorboardX import SummaryWriter

from federation.readable import moment
from orchestrator.history import Found, History, Tail

ALL = "all_sites"


class Tracked:
    """The event files of one study, as far as its journal has been read.

    Parameters
    ----------
    found : Found
        The study.
    folder : Path
        TensorBoard's folder (`--logdir`); what lies there of this study is replaced.
    """

    def __init__(self, found: Found, folder: Path) -> None:
        self.folder = folder / f"{found.study.name}-{found.study.id[:12]}"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.history, self._tail = History(found.study), Tail(found.folder / "journal.jsonl")
        self._writers: dict[str, SummaryWriter] = {}

    def read_on(self) -> None:
        """Take in what was added to the journal, and write it."""
        for line in self._tail.lines():
            before = {name: len(site.epochs) for name, site in self.history.sites.items()}
            self.history.take(line)
            for name, site in self.history.sites.items():
                for epoch in site.epochs[before[name] :]:
                    at = moment(line["at"])
                    self._write(name, "train_loss", epoch.fold, epoch.train_loss, epoch.epoch, at)
                    self._write(name, "val_loss", epoch.fold, epoch.val_loss, epoch.epoch, at)
                    self._write(name, "learning_rate", epoch.fold, epoch.learning_rate, epoch.epoch, at)
                    if epoch.mean_dice is not None:
                        self._write(name, "pseudo_dice", epoch.fold, epoch.mean_dice, epoch.epoch, at)
            if line["event"] == "closed":
                self._round(line["fold"], line["round"], moment(line["at"]))
        for writer in self._writers.values():
            writer.flush()

    def _round(self, fold: str, number: int, at: float) -> None:
        """What all sites together did in a round."""
        done = self.history.rounds[-1]
        self._write(ALL, "sites", fold, len(done.participants), number, at)
        self._write(ALL, "round_seconds", fold, done.seconds, number, at)
        for name in ("train_loss", "val_loss", "mean_dice"):
            curve = self.history.pooled_curve(fold, name)
            if curve:
                epoch, value = curve[-1]
                self._write(ALL, "pseudo_dice" if name == "mean_dice" else name, fold, value, epoch, at)

    def _write(self, site: str, name: str, fold: str, value: float, step: int, at: float) -> None:
        if site not in self._writers:
            self._writers[site] = SummaryWriter(str(self.folder / site), write_to_disk=True)
        self._writers[site].add_scalar(f"fold_{fold}/{name}", value, step, walltime=at)

    def close(self) -> None:
        """Close the files."""
        for writer in self._writers.values():
            writer.close()


def track(found: Found, folder: Path, follow: bool, pause: Callable[[], None]) -> Path:
    """Write event files, and with `follow` go on until the study ends; returns their folder."""
    tracked = Tracked(found, folder)
    try:
        tracked.read_on()
        while follow and tracked.history.ended is None:
            pause()
            tracked.read_on()
    finally:
        tracked.close()
    return tracked.folder
