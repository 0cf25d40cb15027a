"""``factorkit pose``, ``reconstruct``, ``render``, ``sample`` and ``export``: use a nerfdiff run."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from factorkit.cli.base import Flag, OptionalFloat, OptionalInt, OptionalPath, OutputCommand, Paths, Result, RunCommand
from factorkit.utils.errors import ConfigError, format_count

if TYPE_CHECKING:
    from factorkit.data.views.views import Views
    from factorkit.nerfdiff.run import NerfdiffRun
    from factorkit.nerfdiff.splat_scene import SplatScene, Up

GRID_VIEWS, TRAJECTORY_STEPS = 10, 10  # at most, in an image grid


@dataclass(kw_only=True)
class Pose(OutputCommand):
    """Predict the camera poses of images of a known scene.

    The result is a camera-to-world matrix for each image in the coordinates of the run (OpenGL axes), the score of
    every candidate camera, and the intrinsics at which the image was read.

    Examples:
        factorkit pose runs/lego photo.png more/ --json
        factorkit pose runs/lego photo.png --out poses.json
    """

    paths: Paths
    """Images, a folder of images, or views in any format that train reads."""
    out: OptionalPath = None
    """JSON file to write."""
    refine: int = 0
    """Steps that refine the poses by the photometric error, with --check from the checked candidate. 60 steps remove
    the last degrees."""
    check: Flag = False
    """Choose the candidate whose render is most similar to the image, instead of the one with the best score."""
    fov: OptionalFloat = None
    """Field of view of the images in degrees along the longer side. The default is that of their cameras or EXIF, else
    the run's."""

    def execute(self) -> Result:
        """Write the poses of the images."""
        from factorkit.utils import distributed
        from factorkit.utils.output_record import check_file, writing_file

        source = _describe(self, "pose", self.paths)
        place: dict[str, Any] = {"overwrite": self.overwrite, "inputs": list(_list_files(self.paths))}
        if self.out is not None:
            check_file(self.out, source, **place)
        run = _load(self)
        views = open_images(run, self.paths, self.fov)
        result = run.predict_pose(views, refine=self.refine, check=self.check)
        values = zip(views.names, result.poses.tolist(), result.scores.tolist(), strict=True)
        frames: list[dict[str, Any]] = [
            {"name": name, "camera_to_world": matrix, "scores": scores, **_describe_camera(views, i)}
            for i, (name, matrix, scores) in enumerate(values)
        ]

        def write(out: Path) -> None:
            with writing_file(out, source, **place) as temporary:
                temporary.write_text(json.dumps({"frames": frames}, indent=2) + "\n", encoding="utf-8")

        if (out := self.out) is not None:
            distributed.run_on_first(lambda: write(out))
        lines = [f"{f['name']}: at " + ", ".join(f"{row[3]:.3f}" for row in f["camera_to_world"][:3]) for f in frames]
        return {"frames": frames, "out": None if out is None else str(out)}, "\n".join(lines)


@dataclass(kw_only=True)
class Reconstruct(OutputCommand):
    """Render the scene from the predicted poses of images, each with its own intrinsics and shape.

    OUT receives NAME.png and NAME_depth.png for each image, and overview.png with images beside renders.

    Examples:
        factorkit reconstruct runs/lego photo.png more/ --out rendered
    """

    paths: Paths
    """Images, a folder of images, or views in any format that train reads."""
    out: Path
    """Folder to write to. It is created if needed."""
    size: OptionalInt = None
    """Pixels of the longer side. The default is the training resolution."""
    fov: OptionalFloat = None
    """Field of view of the images in degrees along the longer side. The default is that of their cameras or EXIF, else
    the run's."""

    def execute(self) -> Result:
        """Write a grid of the images and the scene from their poses."""
        from PIL import Image

        from factorkit.nerfdiff.previews.views import disparity_pixels, draw_view_grid
        from factorkit.utils import distributed
        from factorkit.utils.images import images_to_pixels
        from factorkit.utils.output_record import OutputRecord

        source = _describe(self, "reconstruct", self.paths)
        record = OutputRecord(self.out, overwrite=self.overwrite, inputs=_list_files(self.paths))
        record.check(["overview.png"], source)
        run = _load(self)
        views = open_images(run, self.paths, self.fov)
        stems = file_stems(views.names)
        record.check([f"{stem}{end}" for stem in stems for end in (".png", "_depth.png")], source)
        renders = run.reconstruct(views, self.size)
        path = self.out / "overview.png"

        def write() -> None:
            files: dict[str, Image.Image] = {}
            disparities = disparity_pixels(renders.depth, renders.opacity)
            height, width = renders.images.shape[2:]
            for i, (stem, image) in enumerate(zip(stems, images_to_pixels(renders.images), strict=True)):
                region = views.content_region(i, (height, width))  # other shapes are padded
                files[f"{stem}.png"] = Image.fromarray(image[region])
                files[f"{stem}_depth.png"] = Image.fromarray(disparities[i][region])
            n = slice(0, GRID_VIEWS)
            originals = views.resize((height, width)).images[n]
            files[path.name] = draw_view_grid(
                originals, renders.images[n], renders.depth[n], renders.opacity[n], views.names[n]
            )
            with record:
                record.write({name: image.save for name, image in files.items()}, source)

        distributed.run_on_first(write)
        data = {"out": str(self.out), "reconstructed": len(views), "overview": str(path)}
        return data, f"{len(views)} reconstructed: {self.out}\noverview: {path}"


@dataclass(kw_only=True)
class Render(OutputCommand):
    """Render the scene along a camera path, or from the cameras of a file.

    Examples:
        factorkit render runs/lego --out orbit.gif
        factorkit render runs/lego --poses poses.json --out frames/
        factorkit render runs/lego --path spiral --frames 120 --size 400 --out spiral.mp4
        factorkit render runs/lego --out frames/
        factorkit render splats.ply --up=-y --out orbit.gif
    """

    out: Path
    """A .gif or .mp4 file, or a folder for PNG files."""
    path: Literal["orbit", "spiral"] = "orbit"
    """orbit: once around at a constant height. spiral: once around while rising and sinking."""
    poses: OptionalPath = None
    """Instead of a path: JSON file that pose or sample wrote, or a transforms.json. Each image has the intrinsics and
    the size of its camera where the file has them."""
    coordinates: Annotated[Literal["run", "given"] | None, arg(help_behavior_hint="")] = None
    """Of --poses. run: those of the run, as pose, sample and export write. given: those of the training data. Needed
    for a transforms.json."""
    frames: int = 60
    """Number of images."""
    size: OptionalInt = None
    """Pixels of the longer side. The default is the training resolution; 512 of a splat file."""
    up: Annotated[Literal["z", "y", "-y", "-z"] | None, arg(help_behavior_hint="")] = None
    """Axis that points up, of a splat file from elsewhere. The default is z, and y of a .spz."""

    def execute(self) -> Result:
        """Write the frames, as images or a video."""
        from factorkit.nerfdiff.camera_files import render_cameras
        from factorkit.nerfdiff.export.frames import check_frames, write_frames
        from factorkit.utils import distributed

        what = f"render {self.path if self.poses is None else self.poses.resolve()}"
        place: dict[str, Any] = {"source": _describe(self, what), "overwrite": self.overwrite}
        check_frames(self.out, **place)
        images: Any
        if self.poses is None:
            images = _load_scene(self, self.up).render_path(self.path, self.size, self.frames).images
        else:
            images = render_cameras(_load_scene(self), self.poses, self.coordinates, self.size)
        distributed.run_on_first(lambda: write_frames(self.out, images, **place))
        return {"out": str(self.out), "frames": len(images)}, f"{format_count(len(images), 'frame')}: {self.out}"


@dataclass(kw_only=True)
class Sample(OutputCommand):
    """Generate views and their cameras from pure noise.

    OUT receives view_0000.png and so on, poses.json, and with --trajectory trajectory.png with the denoising steps.

    Examples:
        factorkit sample runs/lego -n 8 --out sampled --trajectory
    """

    out: Path
    """Folder to write to. It is created if needed."""
    count: Annotated[int, arg(aliases=["-n"])] = 4
    """Number of views."""
    steps: OptionalInt = None
    """Denoising steps. The default is the whole schedule."""
    seed: int = 0
    """The same seed generates the same views."""
    trajectory: Flag = False
    """Also show the views during denoising."""

    def execute(self) -> Result:
        """Write a grid of the generated views."""
        import numpy as np
        from PIL import Image

        from factorkit.nerfdiff.previews.views import draw_denoising_grid
        from factorkit.utils import distributed
        from factorkit.utils.images import images_to_pixels
        from factorkit.utils.output_record import OutputRecord

        source, record = _describe(self, f"sample, seed {self.seed}"), OutputRecord(self.out, overwrite=self.overwrite)
        record.check([*(f"view_{i:04d}.png" for i in range(self.count)), "poses.json"], source)
        run = _load(self)
        result = run.sample(n=self.count, steps=self.steps, seed=self.seed, trajectory=self.trajectory)
        data: dict[str, Any] = {
            "out": str(self.out),
            "views": len(result.images),
            "poses": str(self.out / "poses.json"),
        }
        grid: Image.Image | None = None
        if result.trajectory is not None:
            count = len(result.trajectory)
            columns = np.linspace(0, count - 1, min(TRAJECTORY_STEPS, count)).round().astype(int)
            steps = [result.trajectory[i] for i in columns]
            data["trajectory"] = str(self.out / "trajectory.png")
            grid = draw_denoising_grid(
                [step.images[:GRID_VIEWS].clamp(0, 1) for step in steps],
                [step.cameras.best_poses[:GRID_VIEWS] for step in steps],
                [step.t for step in steps],
                [((step.noisy[:GRID_VIEWS] + 1) / 2).clamp(0, 1) for step in steps],
                run.scene["layout"],
            )

        def write() -> None:
            pixels, poses = images_to_pixels(result.images), json.dumps({"poses": result.poses.tolist()}, indent=2)
            files: dict[str, Callable[[Path], Any]] = {
                f"view_{i:04d}.png": Image.fromarray(image).save for i, image in enumerate(pixels)
            }
            files["poses.json"] = lambda path: path.write_text(poses + "\n", encoding="utf-8")
            if grid is not None:
                files["trajectory.png"] = grid.save
            with record:
                record.write(files, source)

        distributed.run_on_first(write)
        return data, f"{format_count(data['views'], 'view')}: {self.out}"


@dataclass(kw_only=True)
class Export(OutputCommand):
    """Write the scene or its cameras in a format of other programs, or a splat file as another one.

    Images and cameras have the size of the training data, with their lenses and opacity. A .glb and a .spz have y up.

    Examples:
        factorkit export runs/lego scene.ply
        factorkit export runs/lego mesh.glb
        factorkit export runs/lego nerfstudio/transforms.json
        factorkit export runs/lego colmap/ --coordinates given
        factorkit export splats.ply splats.spz
    """

    out: Positional[Annotated[Path, arg(metavar="OUT")]]
    """scene.ply (coloured points; of a scene of Gaussians its splats), points.ply, mesh.ply (also .obj, .glb),
    splats.ply (Gaussians, also .spz), transforms.json (nerfstudio), or a folder (COLMAP)."""
    kind: Annotated[Literal["points", "mesh", "splats", "nerfstudio", "colmap"] | None, arg(help_behavior_hint="")] = (
        None
    )
    """What to write. The default follows from the name of OUT."""
    coordinates: Literal["run", "given"] = "run"
    """run: those of the run, an object around the origin with z up. given: those of the training data's cameras."""
    data: OptionalPath = None
    """Where the training data are now. The default is where they were."""

    def execute(self) -> Result:
        """Write the scene or its cameras."""
        options = {"kind": self.kind, "coordinates": self.coordinates, "data": self.data}
        written = _load_scene(self).export(self.out, overwrite=self.overwrite, **options)
        return {"out": str(written)}, f"written: {written}"


def open_images(run: NerfdiffRun, paths: Sequence[Path], fov: float | None = None) -> Views:
    """Open the images that a user named; see `NerfdiffRun.open_images`."""
    if not paths:
        raise ConfigError("no images are given; name files or a folder after RUN")
    source = paths[0] if len(paths) == 1 else [str(path) for path in paths]
    return run.open_images(source, fov)


def file_stems(names: Sequence[str]) -> list[str]:
    """Return a distinct file name without suffix for each view."""
    stems: list[str] = []
    for name in names:
        stem = Path(name.replace("/", "_")).stem
        candidates = itertools.chain((stem,), (f"{stem}-{i}" for i in itertools.count(2)))
        stems.append(next(c for c in candidates if c not in stems and c != "overview"))
    return stems


def _describe_camera(views: Views, index: int) -> dict[str, float]:
    """Return the intrinsics of a view without padding, with the keys of transforms.json."""
    height, width = views.own_size(index)
    k = views.own_intrinsics(index, (height, width)).tolist()
    return {"fl_x": k[0][0], "fl_y": k[1][1], "cx": k[0][2], "cy": k[1][2], "w": width, "h": height}


def _describe(command: RunCommand, what: str, paths: Sequence[Path] = ()) -> str:
    """Return what identifies the input of a result: what is done, the run, and the files that it is done with."""
    return "\n".join([f"{what}: {command.run.resolve()}", *(str(path.resolve()) for path in paths)])


def _list_files(paths: Sequence[Path]) -> Iterator[Path]:
    """Yield the files that the user named, and those of the folders."""
    for path in paths:
        yield path
        if path.is_dir():
            yield from path.rglob("*")


def _load_scene(command: RunCommand, up: Up | None = None) -> NerfdiffRun | SplatScene:
    """Load a run or a splat file."""
    from factorkit.nerfdiff.export import SPLAT_SUFFIXES
    from factorkit.nerfdiff.splat_scene import SplatScene

    if command.run.suffix.lower() in SPLAT_SUFFIXES:
        return SplatScene(command.run, device=command.device, up=up)
    if up is not None:
        raise ConfigError(f"--up {up} is of splat files; {command.run} has z up, or y in forward-facing scenes")
    return _load(command)


def _load(command: RunCommand) -> NerfdiffRun:
    from factorkit.nerfdiff.export import SPLAT_SUFFIXES
    from factorkit.nerfdiff.run import NerfdiffRun

    if command.run.suffix.lower() in SPLAT_SUFFIXES:
        raise ConfigError(f"{command.run} is a splat file, which only render, export and view take; give a run")
    return NerfdiffRun.load(command.run, device=command.device)
