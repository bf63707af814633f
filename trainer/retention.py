"""What is removed from the disk: what killed attempts left behind, old checkpoints, and what is to be trained again.

A manifest goes before the files that it names, so nothing that exists lacks a file, also when this is killed in the
middle; the next call goes on. Call it where nobody else writes: under the night's lock.
"""

import re
from collections.abc import Collection, Iterator, Sequence

from trainer.checkpoint import MANIFEST, PROGRESS, Checkpoint, Checkpoints
from trainer.intervals import Interval

_ATTEMPT = re.compile(r"[0-9a-f]{12}")


def clean(checkpoints: Checkpoints, interval: Interval) -> None:
    """Remove from the newest interval's folder what neither its manifest nor, before that is there, its newest snapshot
    needs.
    """
    checkpoints.mine()
    storage = checkpoints.storage
    if storage.exists(f"{interval.folder}/{MANIFEST}"):
        current: Checkpoint | None = checkpoints.open(interval)
        storage.delete(f"{interval.folder}/{PROGRESS}")
    else:
        current = checkpoints.progress(interval)
    _keep_only(checkpoints, interval, _needed([current] if current else []))


def sweep(checkpoints: Checkpoints) -> None:
    """Remove what a killed night left behind: in the newest committed interval, in those that were begun after it, and
    what it was writing anywhere (the champion, the lock). Call it while nobody writes there.
    """
    begun, committed = checkpoints.begun(), checkpoints.intervals()
    for interval in begun if not committed else [each for each in begun if each >= committed[-1]]:
        clean(checkpoints, interval)
    checkpoints.storage.remove_leftovers()


def prune(checkpoints: Checkpoints, *, keep_days: int, keep_bases: int, keep: Collection[Interval] = ()) -> None:
    """Remove the checkpoints that are older than the newest keep_days days, but the newest keep_bases bases among them
    and those of `keep` (the champion). The layers that what is kept needs stay, whosesoever they are.
    """
    checkpoints.mine()
    begun, committed = checkpoints.begun(), checkpoints.intervals()
    recent = [i for i in committed if (committed[-1].day - i.day).days < keep_days]
    if not recent or begun[0] >= recent[0]:
        return
    old = [interval for interval in committed if interval < recent[0]]
    opened = {interval: checkpoints.open(interval) for interval in old}
    bases = [interval for interval in old if opened[interval].is_base]
    kept = {*recent, *bases[len(bases) - min(keep_bases, len(bases)) :], *keep}
    for interval in old:
        if interval not in kept:
            checkpoints.storage.delete(f"{interval.folder}/{MANIFEST}")
    needed = _needed(
        [*(opened[interval] for interval in old if interval in kept), *_reaching_back(checkpoints, recent)]
    )
    for interval in begun:
        if interval < recent[0] and interval not in kept:
            _keep_only(checkpoints, interval, needed)


def _reaching_back(checkpoints: Checkpoints, recent: Sequence[Interval]) -> Iterator[Checkpoint]:
    """Of the newest intervals those whose chains begin before them. A chain goes on from that of the interval before or
    begins anew, so after the first that begins among them no other reaches further back.
    """
    for interval in recent:
        checkpoint = checkpoints.open(interval)
        if Interval.parse(checkpoint.layers[0]["interval"], "a manifest") >= recent[0]:
            return
        yield checkpoint


def remove(checkpoints: Checkpoints, first: Interval) -> None:
    """Drop the commits from an interval on, newest first, and all that they wrote: they are to be trained again. If one
    of them serves, move the champion before.
    """
    checkpoints.mine()
    dropped = [interval for interval in reversed(checkpoints.begun()) if interval >= first]
    for interval in dropped:
        for name in (MANIFEST, PROGRESS):
            checkpoints.storage.delete(f"{interval.folder}/{name}")
    for interval in dropped:
        _keep_only(checkpoints, interval, set())


def _needed(kept: Collection[Checkpoint]) -> set[str]:
    return {name for checkpoint in kept for name, _ in checkpoint.files()}


def _keep_only(checkpoints: Checkpoints, interval: Interval, needed: set[str]) -> None:
    """Remove all files of an interval's attempts but those."""
    storage = checkpoints.storage
    attempts = [name for name in storage.folders(interval.folder) if _ATTEMPT.fullmatch(name)]
    for folder in (f"{interval.folder}/{attempt}" for attempt in attempts):
        if not any(name.startswith(f"{folder}/") for name in needed):
            storage.delete_folder(folder)
            continue
        for file in storage.files(folder, recursive=True):
            if f"{folder}/{file}" not in needed:
                storage.delete(f"{folder}/{file}")
