"""What a run tells: progress line, JSON lines, curve, SwanLab. Only rank 0 has one that writes."""

import json
import math
import os
import sys
import time
from pathlib import Path

import torch

from model.errors import InputError
from model.loading import write_files


class RunLog:
    """The log of one run: out/logs/<name>.jsonl, <name>.png, the progress line, SwanLab where asked for.

    total_steps and name are known only after the model and the data: open() comes after both.
    """

    def __init__(self, folder: Path, stage: str, device: torch.device):
        self.folder, self.stage, self.device = folder, stage, device
        self.records: list[dict] = []
        self.tracker = None
        self.writes = False  # until open(), and for ever on ranks above 0
        self.elapsed_before = 0.0  # seconds of the run that this one resumes
        self.started = self.logged_at = time.monotonic()
        self.logged_tokens, self.paused = 0, 0.0

    def open(self, name: str, total_steps: int, resumed_at: int = 0) -> None:
        """Begin the file anew, or cut off what a resumed run wrote after its checkpoint at step `resumed_at`."""
        self.path, self.total_steps, self.first_step, self.writes = (
            self.folder / f"{name}.jsonl",
            total_steps,
            resumed_at,
            True,
        )
        self.records = [r for r in read_records(self.path) if r["step"] <= resumed_at] if resumed_at else []
        write_records(self.path, self.records)

    def start_clock(self, tokens: int) -> None:
        """Training begins now: what came before is not in tokens_per_s and ETA."""
        self.logged_at, self.logged_tokens = time.monotonic(), tokens
        self.training_from = self.logged_at

    def pause(self, seconds: float) -> None:
        """Seconds that were not spent on training."""
        self.logged_at += seconds
        self.paused += seconds

    def elapsed(self) -> float:
        return self.elapsed_before + time.monotonic() - self.started

    def write(self, step: int, tokens: int, meters: dict[str, float], skipped_steps: int) -> None:
        """One JSON line (step, tokens, meters, tokens_per_s, elapsed_s, peak_memory_mb) and a progress line."""
        now = time.monotonic()
        record = {"step": step, "tokens": tokens, **meters}
        if tokens > self.logged_tokens:
            record["tokens_per_s"] = round((tokens - self.logged_tokens) / max(now - self.logged_at, 1e-9), 1)
        record |= {"elapsed_s": round(self.elapsed(), 2), "peak_memory_mb": peak_memory_mb(self.device)}
        if skipped_steps:
            record["skipped_steps"] = skipped_steps
        self.logged_at, self.logged_tokens = now, tokens
        if not self.writes:
            return
        record = {key: value if math.isfinite(value) else None for key, value in record.items()}  # NaN would be no JSON
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self.records.append(record)
        if self.tracker:
            self.tracker.log({key: value for key, value in record.items() if value is not None}, step=step)
        shown = "  ".join(
            f"{key} {format_meter(key, value)}" for key, value in record.items() if key not in ("step", "tokens")
        )
        eta = (self.total_steps - step) * (now - self.training_from) / max(step - self.first_step, 1)
        print(f"{self.stage} {step}/{self.total_steps}  {shown}  eta {clock(eta)}", flush=True)

    def estimate(self, step: int, seconds: float) -> None:
        """Say after the first steps, of `seconds` each, how long the run will take and what memory it needed."""
        left = (self.total_steps - step) * seconds
        print(
            f"{seconds:.2f} s a step: about {clock(left)} for the {self.total_steps - step:,} steps to come, "
            f"evaluations not counted; peak memory so far {peak_memory_mb(self.device):,} MB",
            flush=True,
        )

    def track(self, project: str, name: str, config: dict) -> None:
        """Send the log to SwanLab too: online where an account is logged in, else into a folder beside the log."""
        try:
            import swanlab
        except ImportError:
            raise InputError("--use_wandb needs swanlab: pip install swanlab") from None
        mode = os.environ.get("SWANLAB_MODE") or ("online" if swanlab.Settings().api_key else "offline")
        folder = self.folder / "swanlab"
        if printable(str(folder.absolute())) != str(folder.absolute()):
            raise InputError(f"SwanLab cannot write to {folder}, which is not UTF-8: choose another --out_dir")
        folder.mkdir(parents=True, exist_ok=True)
        noted = folder / f"{name}.id"  # of the experiment, for a resumed run to go on with
        known = noted.read_text(encoding="utf-8") if self.first_step and noted.exists() else None
        again = {"id": known, "resume": "allow"} if known else {}
        self.tracker = swanlab
        config = {key: printable(value) for key, value in config.items()}
        run = swanlab.init(
            project=project, name=printable(name), config=config, mode=mode, log_dir=str(folder), **again
        )
        noted.write_text(run.id, encoding="utf-8")
        print(f"SwanLab: {mode}, project {project}" + ("" if mode == "online" else f", in {folder}"))

    def close(self) -> None:
        """Draw the curve and end the tracker. Both are extras: a failure is a note, and hides no error of the run."""
        ending = sys.exception()  # what ends the run, if something does: its sentence is the one to read
        extras = {"the curve was not drawn": self.plot} if self.writes and self.records else {}
        extras |= {"SwanLab did not get everything": self.tracker.finish} if self.tracker else {}
        self.tracker = None
        for failure, extra in extras.items():
            try:
                extra()
            except Exception as error:
                if ending is None:
                    said = str(error).strip().splitlines() or [type(error).__name__]
                    print(f"note: {failure}: {said[0][:120]}", file=sys.stderr)

    def plot(self) -> None:
        """Draw the curve of the log, its loss or its reward, into out/logs/<name>.png.

        Without pyplot, which would open the backend that MPLBACKEND names: a notebook's, for one.
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(8, 4.5))
        axes = figure.subplots()
        curves = {"loss": "-", "val_loss": "o-"}
        if any("reward" in record for record in self.records):  # there the loss says nothing
            curves = {"reward": "-", "val_reward": "o-", "accuracy": "-", "val_accuracy": "o-"}
        for key, style in curves.items():
            draw_curve(axes, self.records, "tokens", key, style, label=key)
        label = "loss (nats per token)" if "loss" in curves else "reward, share of right replies"
        axes.set(xlabel="tokens", ylabel=label, title=self.path.stem)
        if axes.lines:
            axes.legend()
        save_figure(figure, self.path.with_suffix(".png"))


def draw_curve(axes, records: list[dict], x: str, y: str, style: str, **how) -> None:
    """A line through the records that have this figure, if any has."""
    axes.grid(alpha=0.3)
    points = [(record[x], record[y]) for record in records if record.get(y) is not None]
    if points:
        axes.plot(*zip(*points, strict=True), style, markersize=4, linewidth=1.2, **how)


def save_figure(figure, path: Path) -> None:
    write_files({path: lambda file: figure.savefig(file, dpi=110, bbox_inches="tight")})


REWARDED = {  # title -> what is sampled, and what is held out
    "reward": ("reward", "val_reward"),
    "share right and in form": ("accuracy", "val_accuracy"),
    "tokens of a reply": ("reply_tokens", "val_reply_tokens"),
    "KL to the start, where the stage weighs it": ("kl", None),
}


def plot_stages(logs: dict[str, Path], path: Path) -> None:
    """Reward, strict accuracy, length and KL of reinforcement-learning stages, {name: log}, as one PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7))
    panels = figure.subplots(2, 2).flat
    for axes, (title, (sampled, held_out)) in zip(panels, REWARDED.items(), strict=True):
        for number, (name, log) in enumerate(logs.items()):
            records = read_records(log)
            draw_curve(axes, records, "elapsed_s", sampled, "-", color=f"C{number}", label=name, alpha=0.6)
            if held_out:
                draw_curve(axes, records, "elapsed_s", held_out, "o-", color=f"C{number}", label=f"{name}, held out")
        axes.set(title=title, xlabel="seconds, evaluations too")
        if axes.lines:
            axes.legend(fontsize="small")
    figure.tight_layout()
    save_figure(figure, path)


def printable(value: object) -> object:
    """Half a character in a text (a file name's bytes) escaped as in JSON; SwanLab's files are UTF-8."""
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value


def read_records(path: Path) -> list[dict]:
    """The whole lines of a log; what a kill left of the last one is dropped."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def write_records(path: Path, records: list[dict]) -> None:
    """Replace a file of JSON lines; a kill meanwhile loses nothing."""
    lines = "".join(json.dumps(record) + "\n" for record in records)
    write_files({path: lambda file: file.write(lines.encode())})


def keep_steps(path: Path, last_step: int) -> None:
    """Cut a file of JSON lines off after the lines of a step."""
    kept = [record for record in read_records(path) if record["step"] <= last_step]
    write_records(path, kept)


def peak_memory_mb(device: torch.device) -> int:
    """Peak memory so far: the GPU's where there is one, else the process's resident set."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10))


def format_meter(key: str, value: float | None) -> str:
    if value is None:
        return "not finite"
    if key == "lr":
        return f"{value:.1e}"
    return f"{value:,.0f}" if abs(value) >= 100 or isinstance(value, int) else f"{value:.3f}"


def clock(seconds: float) -> str:
    """h:mm:ss, or m:ss below an hour."""
    minutes, seconds = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
