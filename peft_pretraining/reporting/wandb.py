"""Weights & Biases as a mirror of metrics.jsonl that can never stop a run.

Whatever fails in wandb causes one warning, after which the run goes on without it.

wandb cannot go on with an offline run: each start makes another folder whose steps begin at 0, and `wandb sync` either
replaces the run by the newest of them (up to 0.29) or adds them up, updates that were made again twice. So an offline
folder always has the whole run: one that is resumed first gets the lines of metrics.jsonl, which has each update once,
and then replaces the folders before it. The lines keep the steps that they had.
"""

import netrc
import os
import secrets
import shlex
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

_INIT_SECONDS = 30


def has_login() -> bool:
    """Whether the environment or netrc has an API key for wandb; never uses the network."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    named = os.environ.get("NETRC")
    for path in [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            if _hosts() & netrc.netrc(path).hosts.keys():
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _hosts() -> set[str]:
    """The servers whose key would be used: $WANDB_BASE_URL, else wandb's own, whose name differs by version."""
    if named := os.environ.get("WANDB_BASE_URL"):
        return {urlparse(named).netloc}
    hosts = {"api.wandb.ai"}
    try:
        import wandb

        hosts.add(urlparse(str(wandb.Settings().base_url)).netloc)
    except Exception:  # wandb is absent or broken, which is reported when it is started
        pass
    return hosts


def resolve_mode(mode: str) -> str:
    """Resolve `auto` to online, offline or off: by $WANDB_MODE, else online with a login and offline without."""
    if mode != "auto":
        return mode
    wanted = os.environ.get("WANDB_MODE", "").lower()
    if wanted in ("disabled", "dryrun", "offline", "online"):
        return {"disabled": "off", "dryrun": "offline"}.get(wanted, wanted)
    return "online" if has_login() else "offline"


class WandbMirror:
    """A run of wandb. No method raises, whatever wandb does; `warn` gets the first failure.

    If the server cannot be reached at the start, an online run becomes an offline one.
    """

    def __init__(
        self,
        save_dir: Path,
        mode: str,
        *,
        project: str,
        name: str,
        tags: Sequence[str],
        config: Mapping[str, Any],
        run_id: str | None,
        warn: Callable[[str], None],
        history: Callable[[], Sequence[Mapping[str, Any]]] = list,
    ) -> None:
        """`mode`: auto, online, offline or off; `run_id`: of the run that is resumed; `history` returns its metrics."""
        self._warn = warn
        self._save_dir, self._history = save_dir, history
        self._folder: Path | None = None  # of an offline run
        self._warned = False
        self._run: Any = None
        self.mode = resolve_mode(mode)
        self.run_id = run_id
        if self.mode == "off":
            return
        self.run_id = run_id or secrets.token_hex(4)
        self._options: dict[str, Any] = {
            "project": project,
            "name": name,
            "tags": list(tags),
            "config": dict(config),
            "id": self.run_id,
            "dir": str(save_dir),
        }
        if self.mode == "online":
            self._guard("start", lambda: self._start(resume="allow" if run_id else None))
            if self._run is None:
                self.mode = "offline"
                self._guard("start", self._forget_server)
        if self.mode == "offline":
            self._guard("start", self._start_offline)

    @property
    def upload_command(self) -> str:
        """The command that uploads what was recorded offline; "" if nothing was."""
        return f"wandb sync {shlex.quote(str(self._folder))}" if self._folder is not None else ""

    def log_metrics(self, update_step: int, metrics: Mapping[str, float | None]) -> None:
        """Send the metrics of one update."""
        if self._run is not None:
            self._guard("log", lambda: self._run.log({"update_step": update_step, **metrics}))

    def close(self, failed: bool = False) -> None:
        """Finish the run of wandb."""
        run, self._run = self._run, None
        if run is not None:
            self._guard("finish", lambda: run.finish(exit_code=int(failed)))

    def _start(self, resume: str | None = None) -> None:
        import wandb

        timeout = float(os.environ.get("WANDB_INIT_TIMEOUT", _INIT_SECONDS))
        settings = wandb.Settings(init_timeout=timeout, silent=True, console="off")
        options: dict[str, Any] = {**self._options, "mode": self.mode, "resume": resume}
        run = wandb.init(settings=settings, **options)
        run.define_metric("update_step")
        run.define_metric("*", step_metric="update_step")
        self._run = run

    def _start_offline(self) -> None:
        history = self._history()
        earlier = list((self._save_dir / "wandb").glob(f"offline-run-*-{self.run_id}"))
        if not history and not earlier:
            # A run that goes on in another folder without its metrics would replace the one there when it is uploaded.
            self.run_id = self._options["id"] = secrets.token_hex(4)
        self._start()
        self._folder = Path(self._run.settings.sync_dir).absolute()
        for line in history:
            self._run.log(dict(line))
        for folder in earlier:
            if folder.absolute() != self._folder:
                shutil.rmtree(folder, ignore_errors=True)

    def _forget_server(self) -> None:
        import wandb

        # A run that failed to start leaves its id in use, and an offline run of that id would write nothing.
        wandb.teardown()

    def _guard(self, action: str, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # a mirror may break in any way; the run must not
            self._run = None
            if self._warned:
                return
            self._warned = True
            reason = str(error).strip().splitlines()
            then = "it records offline" if self.mode == "online" and action == "start" else "the run goes on without it"
            self._warn(
                f"warning: wandb could not {action} ({type(error).__name__}: {reason[0] if reason else 'no reason'}); "
                f"{then}, and metrics.jsonl has every metric"
            )
