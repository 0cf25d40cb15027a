"""Scores as the tables that `evaluate` and the trainings print."""

from __future__ import annotations

from typing import Any

from factorkit.utils.errors import format_count


def format_scores(scores: dict[str, Any]) -> str:
    """Format Acc, IoU and DICE of a segdiff model, its oracle and the baselines, and what they were measured on."""
    if "within" in scores:
        return format_hierarchy(scores)
    from factorkit.metrics.baselines import BASELINES

    metrics = ("acc", "iou", "dice")
    rows = [("model", scores), ("  oracle, best for each image", {key: scores[f"oracle_{key}"] for key in metrics})]
    baselines = scores.get("baselines", {})
    rows += [(name.replace("_", " "), baselines[name]) for name in BASELINES if name in baselines]
    lines = [f"{'':<30} {'Acc':>6} {'IoU':>6} {'DICE':>6}"]
    for name, values in rows:
        numbers = values.get("unavailable") or " ".join(f"{values[key]:6.3f}" for key in metrics)
        lines.append(f"{name:<30} {numbers}")
    foreground = ", ".join(map(str, scores["mapping"]))
    if "level" in scores:
        foreground += f" of level {scores['level']}"
    lines.append(
        f"{format_count(scores['scored'], 'image')} scored at {scores['size']} px; foreground is region "
        f"{foreground}, fitted on "
        f"{scores['fitted_on']} others; areas of the regions {'/'.join(f'{area:.2f}' for area in scores['areas'])}"
    )
    return "\n".join(lines)


def format_generation(scores: dict[str, Any]) -> str:
    """Format the scores of drawn images, of the photos and noise that bound them, and of a plain DDPM."""
    head = f"{'':<14} {'Fréchet':>8} {'grain':>6} {'precision':>9} {'recall':>7} {'FID':>7} {'training s':>10}"
    rows = [("drawn images", scores)]
    if "ddpm" in scores:
        rows.append(("plain DDPM", scores["ddpm"]))
    photos = {name: scores[f"photos_{name}"] for name in ("precision", "recall")}
    rows.append(("other photos", photos | {"frechet": scores["frechet_photos"]}))
    rows.append(("shuffled", {"frechet": scores["frechet_noise"]}))
    columns = (
        ("frechet", 8, 3),
        ("grain", 6, 3),
        ("precision", 9, 3),
        ("recall", 7, 3),
        ("fid", 7, 2),
        ("training_seconds", 10, 0),
    )
    lines = [head]
    for name, row in rows:
        cells = [f"{row[key]:{w}.{d}f}" if key in row else " " * w for key, w, d in columns]
        lines.append(f"{name:<14} {' '.join(cells)}".rstrip())
    no_fid = "" if "fid" in scores else " (not computed: its weights are not on this machine)"
    scale = f"compared at {scores['side']} px" + ", averaged" * (scores["side"] < scores["resolution"])
    lines.append(
        f"{format_count(scores['images'], 'image')} each, {scores['sampler']} in {scores['steps']} steps, {scale}; "
        f"Fréchet distances in fixed random features, which are no FID{no_fid}"
    )
    lines += [f"{name}: {_describe_latents(row)}" for name, row in rows if "own_autoencoder" in row]
    own, plain = (_sum_seconds(row) for row in (scores, scores.get("ddpm", {})))
    if own and plain and not 0.8 < plain / own < 1.25:
        note = ", with the autoencoder" * any(row.get("autoencoder_seconds") for _, row in rows)
        lines.append(f"not of equal compute: the plain DDPM was trained {plain / own:.2g} times as long{note}")
    elif "ddpm_command" in scores:
        advice = f"train one for as long ({scores['ddpm_seconds']:.0f} s), and give it by --ddpm {scores['ddpm_out']}"
        lines += [f"no plain DDPM to compare with: {advice}", f"    {scores['ddpm_command']}"]
        lines += [f"    TRAINING_PHOTOS: {scores['ddpm_data']}"] if "ddpm_data" in scores else []
    if "mask_agreement" in scores:
        lines.append(
            f"masks: segmenting a drawn image gives {scores['mask_agreement']:.1%} of its pixels the region that they "
            f"were drawn with (another image's regions: {scores['mask_agreement_by_chance']:.1%})"
        )
    return "\n".join(lines)


def _describe_latents(scores: dict[str, Any]) -> str:
    """Say which of the seconds that the latents of a run took are among its training seconds."""
    autoencoder = scores["autoencoder_seconds"]
    parts = (
        (scores["encoding_seconds"], True, "encoding the photos"),
        (autoencoder, scores["own_autoencoder"], "its autoencoder"),
    )
    words = [
        f"{'with' if counted and seconds is not None else 'without'} "
        f"{'an unknown time' if seconds is None else f'{seconds:.0f} s'} for {what}"
        for seconds, counted, what in parts
    ]
    return f"training s {' and '.join(words)}" + ", which was given" * (not scores["own_autoencoder"])


def _sum_seconds(scores: dict[str, Any]) -> float:
    """Return the seconds of a training and of the autoencoder that was given to it, as far as they are known."""
    other = 0 if scores.get("own_autoencoder", True) else scores["autoencoder_seconds"]
    return scores.get("training_seconds", 0) + (other or 0)


def format_pose_scores(scores: dict[str, Any]) -> str:
    """Format the errors of a nerfdiff model in degrees and decibels."""

    def degrees(prefix: str) -> str:
        median, share = scores[f"{prefix}rotation_median_deg"], scores[f"{prefix}under_10_deg"]
        return f"{median:6.2f} degrees in the median, {share:.0%} under 10"

    lines = [f"training cameras  {degrees('')}"] if "rotation_median_deg" in scores else []
    lines.append(f"encoder's cameras {degrees('encoder_')}, of {scores['views']} views")
    for name, suffix in (("true cameras", ""), ("encoder's cameras", "_encoder")):
        parts = [f"{k.upper()} {scores[k + suffix]:.3f}" for k in ("ssim", "lpips") if k + suffix in scores]
        lines.append(f"views from {name:<18} PSNR {scores['psnr' + suffix]:.2f} dB  " + "  ".join(parts))
    return "\n".join(lines)


def format_hierarchy(scores: dict[str, Any]) -> str:
    """Format the accuracy of each level of a hierarchy."""
    lines = [f"{'':<10} {'accuracy':>9} {'within':>7} {'largest class':>14}"]
    levels = zip(scores["accuracy"], scores["within"], scores["chance"], strict=True)
    lines += [f"level {n:<4} {a:9.3f} {w:7.3f} {c:14.3f}" for n, (a, w, c) in enumerate(levels, start=1)]
    lines.append("accuracy: right at this level and all above; within: right among those right at the level above")
    lines.append(
        f"{format_count(scores['scored'], 'image')} scored at {scores['size']} px; matched on "
        f"{scores['fitted_on']} others"
    )
    return "\n".join(lines)
