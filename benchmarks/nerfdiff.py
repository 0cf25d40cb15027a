"""Are the cameras found? Trains nerfdiff from several seeds on one scene, scores cameras and held-out views.

    python -m benchmarks.nerfdiff demo --seeds 0 1 2 3 4
    python -m benchmarks.nerfdiff symmetric --seeds 0 1 2 3 4
    python -m benchmarks.nerfdiff symmetric --seeds 0 --set flip_rounds=0
    python -m benchmarks.nerfdiff lego --data LEGO --size 32 --ways dictionary supervised one_start --seeds 0 1 2 3 4
    python -m benchmarks.nerfdiff lego --data LEGO --size 32 --ways joint joint_letter --seeds 0
    python -m benchmarks.nerfdiff lego --data LEGO --roll 10 --set 'optimize_camera=["roll"]' --seeds 0
    python -m benchmarks.nerfdiff lego --data LEGO --focal 0.2 --set 'optimize_camera=["focal"]' --seeds 0
    python -m benchmarks.nerfdiff lego --data LEGO --size 128 --ways supervised dictionary --refine 0 \
        --set 'field="gaussians"' steps=1 num_rendered_views=0 --seeds 0 1 2
    python -m benchmarks.nerfdiff fern --data FERN --size 84 --every 1 --ways supervised one_start --seeds 0

Each run is a JSON object in benchmarks/results/nerfdiff.json with its machine, commit and settings; a run that stands
there is not run again. Without --seeds the table of all results is printed. Scores are of the last step. Beside the
seconds on the clock stand those of the processor, as the machine may have had other things to do.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import time
from pathlib import Path

from benchmarks.recording import append_row, commit, machine, read_results, write_result

RESULTS = Path(__file__).with_name("results") / "nerfdiff.json"
WAYS = {
    "dictionary": {"search": "dictionary"},
    "supervised": {"poses": "known"},
    "one_start": {"poses": "learned"},
    "joint": {"search": "joint"},
    "joint_letter": {"search": "joint", "balance_candidates": False},
    "single": {"search": "joint", "candidate_type": "single", "num_candidates": 1},
}
TRAINING, HELD_OUT = 80, 20  # views of the procedural scene


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", help="demo, symmetric (procedural scenes), or what --data is called")
    parser.add_argument("--data", help="as train_nerfdiff takes it, with poses")
    parser.add_argument("--size", type=int, default=32, help="pixels of the longer side")
    parser.add_argument("--every", type=int, default=8, help="every n-th test view is scored")
    parser.add_argument("--roll", type=float, default=0.0, help="turn training views by up to so many degrees")
    parser.add_argument("--shift", type=float, default=0.0, help="shift them by up to this share of their side")
    parser.add_argument("--zoom", type=float, default=0.0, help="scale them by up to this share")
    parser.add_argument("--focal", type=float, default=0.0, help="relative error of the given focal length")
    parser.add_argument("--ways", nargs="*", choices=WAYS, default=["dictionary"])
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--refine", type=int, default=100, help="steps after the encoder's prediction; 0: not scored")
    parser.add_argument("--seeds", type=int, nargs="*", default=[])
    parser.add_argument("--set", nargs="*", default=[], metavar="FIELD=VALUE", help="other settings, VALUE in JSON")
    parser.add_argument("--out", type=Path, default=Path("runs") / "benchmarks")
    parser.add_argument("--device", default="auto")
    parser.add_argument(
        "--output", type=Path, help="takes the records instead, one line of JSON each; all runs are made"
    )
    args = parser.parse_args()
    changes = {k: json.loads(v) for k, v in (entry.split("=", 1) for entry in args.set)}
    for seed in args.seeds:
        for way in args.ways:
            run_once(args, way, changes, seed)
    print(table(read_results(RESULTS)))


def views_of(args: argparse.Namespace):
    """Training views and held-out ones."""
    from factorkit.data.procedural.scene import make_procedural_views
    from factorkit.data.views.open import open_views

    if args.data is None:
        views = make_procedural_views(TRAINING + HELD_OUT, args.size, symmetric=args.name == "symmetric")
        return views.select(slice(0, TRAINING)), views.select(slice(TRAINING, None))
    held_out = open_views(args.data, "test", args.size)
    return open_views(args.data, "train", args.size), held_out.select(slice(None, None, args.every))


def disturbed(views, seed: int, roll: float = 0.0, shift: float = 0.0, zoom: float = 0.0, focal: float = 0.0):
    """Turn, shift and scale the views at random and give them a wrong focal length.

    The true poses are turned with them.
    """
    from dataclasses import replace

    import roma
    import torch
    import torch.nn.functional as F

    generator = torch.Generator().manual_seed(seed)
    turn, right, down, scale = 2 * torch.rand(4, len(views), generator=generator) - 1
    turn, scale = turn * math.radians(roll), 1 + zoom * scale
    # where each new pixel is taken from: the image's content turns the other way, and so counter-clockwise
    source = torch.stack(
        [
            torch.stack([turn.cos() / scale, -turn.sin() / scale, 2 * shift * right], 1),
            torch.stack([turn.sin() / scale, turn.cos() / scale, 2 * shift * down], 1),
        ],
        1,
    )
    behind = views.background[:, None, None]
    grid = F.affine_grid(source, list(views.images.shape), align_corners=False)
    images = F.grid_sample(views.images - behind, grid, align_corners=False) + behind
    poses = views.poses.clone()
    poses[:, :3, :3] = poses[:, :3, :3] @ roma.rotvec_to_rotmat(torch.stack([0 * turn, 0 * turn, -turn], 1))
    intrinsics = views.intrinsics.clone()
    intrinsics[:, [0, 1], [0, 1]] *= 1 + focal
    return replace(views, images=images.clamp(0, 1), poses=poses, intrinsics=intrinsics, masks=None)


def run_once(args: argparse.Namespace, way: str, changes: dict, seed: int) -> None:
    """Train and score one seed, unless its result is stored already."""
    import torch

    import factorkit
    from factorkit.nerfdiff.config import preset_config

    disturbance = {k: getattr(args, k) for k in ("roll", "shift", "zoom", "focal") if getattr(args, k)}
    words = [args.name, f"{args.size} px", way, *(f"{k}={v:g}" for k, v in disturbance.items())]
    words += [*(f"{k}={v}" for k, v in changes.items()), f"seed={seed}"]
    key = " ".join(words)
    if key in read_results(RESULTS) and not args.output:
        return
    training, held_out = views_of(args)
    if disturbance:
        training = disturbed(training, seed, **disturbance)
    settings = {"resolution": args.size, **WAYS[way], **changes}
    if settings.get("poses") in ("known", "learned"):  # as many steps as search and refinement have together
        usual = preset_config(args.preset, resolution=args.size, field=changes.get("field", "auto"))
        settings = {"field_steps": usual.search_steps + usual.field_steps, **settings}
    out = args.out / key.replace(" ", "_").replace("/", "_")
    shutil.rmtree(out, ignore_errors=True)  # a result is of one unbroken, timed run
    start, busy = time.perf_counter(), time.process_time()
    settings |= {"device": args.device, "seed": seed}
    run = factorkit.train_nerfdiff(training, out=out, preset=args.preset, progress=False, **settings)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    scores = run.evaluate(held_out)
    if args.refine:
        refined = run.evaluate(held_out, refine=args.refine)
        scores |= {f"refined_{key}": refined[key] for key in ("encoder_rotation_median_deg", "psnr_encoder")}
    events = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    alarms = [e for e in events if e["event"] == "alarms"][-1]
    record = {
        "set": args.name,
        "size": args.size,
        "way": way,
        "changes": changes,
        "disturbance": disturbance,
        "preset": args.preset,
        "seed": seed,
        "scores": scores,
        "failures": alarms.get("failures", []),
        "seconds": round(seconds, 1),
        "stage_seconds": stage_seconds(out),
        "processor_seconds": round(busy, 1),
        "machine": machine(run.config.threads or torch.get_num_threads()),
        "commit": commit(),
        "torch": torch.__version__,
    }
    if args.output:
        append_row(args.output, {"name": key, **record})
    else:
        write_result(RESULTS, key, record)
    short = {k: round(v, 3) for k, v in scores.items() if (isinstance(v, float) and "median" in k) or "psnr" in k}
    print(key, short, record["failures"], f"{seconds:.0f} s ({busy:.0f} s of the processor)", flush=True)


def stage_seconds(folder: Path) -> dict[str, float]:
    """Return the seconds of training of each stage of a run, from their logs."""
    logs = {path.parent.name: path for path in sorted(folder.glob("stages/*/log.jsonl"))}
    logs["last"] = folder / "log.jsonl"
    return {
        stage: round(sum(event.get("seconds", 0.0) for event in map(json.loads, path.read_text().splitlines())), 2)
        for stage, path in logs.items()
    }


def table(results: dict[str, dict]) -> str:
    """One line a scene and way: medians over seeds, the worst of what is a mark."""
    groups: dict[str, list[dict]] = {}
    for key, record in results.items():
        groups.setdefault(key.rsplit(" seed=", 1)[0], []).append(record)
    lines = [
        "| run | seeds | median degrees (worst seed) | under 10 (worst) | PSNR at true cameras (worst) | "
        "encoder: degrees | PSNR | refined: degrees | PSNR | said to have failed | processor, s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, records in sorted(groups.items()):
        busy = statistics.median(r["processor_seconds"] for r in records)
        cells = [
            name,
            len(records),
            middle(records, "rotation_median_deg", "{:.2f}", max),
            middle(records, "under_10_deg", "{:.0%}", min),
            middle(records, "psnr", "{:.2f}", min),
            middle(records, "encoder_rotation_median_deg"),
            middle(records, "psnr_encoder"),
            middle(records, "refined_encoder_rotation_median_deg"),
            middle(records, "refined_psnr_encoder"),
            sum(bool(r["failures"]) for r in records),
            round(busy),
        ]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def middle(records: list[dict], key: str, form: str = "{:.2f}", worst=None) -> str:
    """The median over seeds, and the worst seed's in brackets; a dash where it was not measured."""
    values = [r["scores"][key] for r in records if key in r["scores"]]
    if not values:
        return "-"
    return form.format(statistics.median(values)) + (f" ({form.format(worst(values))})" if worst else "")


if __name__ == "__main__":
    main()
