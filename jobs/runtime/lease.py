"""A lease for a place in the storage, so that only one run at a time works there. It is renewed while the run lives.

``PLACE/lease/000000.json`` names the holder: host, process, and a time that changes with each renewal. Each file is
created once, so only one of several runs gets the place. Only its holder rewrites it, to renew the lease.

A run takes the place over by creating the file of the next number. It may do so in three cases. The newest file was
given back. It belongs to a dead process of this machine. Or it belongs to another machine and did not change for
`TTL_S`. The waiting run measures this by its own clock, as clocks of two machines differ. A holder that finds a newer
number than its own has lost the place and ends.

The lease saves work but is not a lock. A process that was paused for long may run for a moment beside its successor.
Results that must exist once are created once in the storage.
"""

import dataclasses
import json
import os
import platform
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from jobs.runtime.commandline import one_line
from jobs.runtime.watchdog import end_process
from mmcore.errors import InputError
from mmcore.storage import Storage

LEASE = "lease"
TTL_S = 60.0
"""How long a holder that is silent is believed to live."""
RENEW_S = 15.0
"""Several renewals fit into `TTL_S`, as one may wait for a storage that does not answer."""


@dataclass(frozen=True)
class Holder:
    """Who holds a lease, and until when."""

    host: str
    machine: str
    """Changes when `host` boots, and differs between containers, whose process numbers are their own."""
    pid: int
    start: str
    """When the process started, as its kernel counts: a process number is used again."""
    expires_unix: float
    """By the holder's own clock, which others do not trust; 0 once it was given back."""

    @classmethod
    def this_process(cls, ttl_s: float) -> "Holder":
        pid = os.getpid()
        return cls(platform.node(), _machine(), pid, _start_of(pid) or "", time.time() + ttl_s)

    def is_of_this_machine(self) -> bool:
        return (self.host, self.machine) == (platform.node(), _machine())

    def is_dead(self) -> bool:
        """Whether this is surely a dead process of this machine."""
        if not self.is_of_this_machine():
            return False
        start = _start_of(self.pid)
        return start is None or start != self.start

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


def _machine() -> str:
    """What two hosts of one name differ in, where the kernel tells: the boot and the namespace of process numbers."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    namespace = Path("/proc/self/ns/pid")
    return f"{boot.read_text().strip()} {os.readlink(namespace)}" if boot.exists() and namespace.is_symlink() else ""


def _start_of(pid: int) -> str | None:
    """When process `pid` of this machine started ("" where the kernel does not tell); None if there is none."""
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        # The fields after the name, from the third of proc(5): state, ..., starttime (22). A zombie is dead.
        return None if fields[0] in "ZX" else fields[19]
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # somebody else's, but alive
    return ""


class Lease:
    """Holds the lease of `place` while a ``with`` block runs; a thread renews it.

    Entering raises InputError while another live run holds it; of another machine's it waits until that one renews its
    lease or has been silent for `ttl_s`. `on_lost` is called, from that thread, with one line
    when another run has taken the place over; by default it ends the process with that line and exit code 1.
    """

    def __init__(
        self,
        place: Storage,
        what: str,
        *,
        ttl_s: float = TTL_S,
        renew_s: float = RENEW_S,
        on_lost: Callable[[str], None] | None = None,
    ) -> None:
        self.place, self.what, self.ttl_s, self.renew_s = place, what, ttl_s, renew_s
        self.on_lost = on_lost or (lambda line: end_process(f"error: {line}"))
        self.number = -1
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew_for_ever, name="lease", daemon=True)

    def __enter__(self) -> "Lease":
        # Once more when another run got the number first: by then its file tells whose it is.
        while not self._take(self._newest()):
            pass
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        # Not for ever: a storage that does not answer must not keep a finished run.
        self._thread.join(self.renew_s)
        if self._thread.is_alive():
            return
        try:
            if self._newest() == self.number:
                self._write(dataclasses.replace(Holder.this_process(self.ttl_s), expires_unix=0.0))
        except Exception as failure:
            # What the run did stands, and what ended it is what the user must hear of.
            reason = one_line(failure) or f"{type(failure).__name__}: {failure}"
            print(f"{self.what}: the lease could not be given back ({reason}); it expires", file=sys.stderr)

    def _newest(self) -> int:
        """The newest number, -1 where there is none."""
        return max((int(name.removesuffix(".json")) for name in (self.place / LEASE).list(".json")), default=-1)

    def _take(self, newest: int) -> bool:
        """Create the file after `newest` if that one does not stand in the way; False if another run was faster."""
        if newest >= 0:
            holder = self._holder(newest)
            held = holder.expires_unix > 0 and not holder.is_dead()
            if held and (holder.is_of_this_machine() or self._is_renewed(newest, holder)):
                raise InputError(f"{self.what} is being run by {holder}: wait for it or stop it")
        self.number = newest + 1
        taken = self.place.create(_name(self.number), self._encoded(Holder.this_process(self.ttl_s)))
        if taken and newest >= 0 and holder.expires_unix > 0:
            print(f"{self.what}: taken over from {holder}, which ended without giving it back", file=sys.stderr)
        if taken and newest > 0:
            # Not `newest` itself, which another run may be about to read.
            self.place.delete(_name(newest - 1))
        return taken

    def _holder(self, number: int) -> Holder:
        return Holder(**json.loads(self.place.read(_name(number))))

    def _is_renewed(self, number: int, holder: Holder) -> bool:
        """Wait for as long as a live holder is silent at most; True as soon as somebody turns out to hold the place."""
        print(
            f"{self.what} is held by {holder}: waiting {self.ttl_s:.0f} s for a sign of life",
            file=sys.stderr,
            flush=True,
        )
        silent_since = time.monotonic()
        while time.monotonic() < silent_since + self.ttl_s:
            time.sleep(min(1.0, self.ttl_s / 10))
            if self._newest() != number:
                return True
            if (now := self._holder(number)) != holder:
                return now.expires_unix > 0
        return False

    def _encoded(self, holder: Holder) -> bytes:
        return (json.dumps(dataclasses.asdict(holder)) + "\n").encode()

    def _write(self, holder: Holder) -> None:
        self.place.write(_name(self.number), self._encoded(holder))

    def _renew_for_ever(self) -> None:
        while not self._stop.wait(self.renew_s):
            try:
                newest = self._newest()
                if newest == self.number:
                    self._write(Holder.this_process(self.ttl_s))
                    continue
                holder = self._holder(newest)
            except Exception as error:  # a storage that fails now may work when the next renewal is due
                reason = one_line(error) or f"{type(error).__name__}: {error}"
                print(f"{self.what}: the lease could not be renewed ({reason}); trying again", file=sys.stderr)
                continue
            self.on_lost(f"{self.what} was taken over by {holder}; this run ends, what it committed stays")
            return


def _name(number: int) -> str:
    return f"{LEASE}/{number:06d}.json"
