"""An interactive browser viewer: points, cameras with their images, and a live render."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import roma
import torch
from torch import Tensor

from factorkit.data.views.views import Views
from factorkit.nerfdiff.export.shapes import MAX_DEPTH, point_cloud
from factorkit.nerfdiff.fields.base import ImageField, field_device, viewer_sampling
from factorkit.nerfdiff.fields.gaussians import GaussianField
from factorkit.nerfdiff.rays import CameraModel, limit_depth, render_views
from factorkit.nerfdiff.scene import box_camera, view_poses
from factorkit.rendering.cameras import MAX_DIRECTION_Z, image_rays
from factorkit.rendering.render import Field, render
from factorkit.rendering.sampling import Sampling
from factorkit.report.image_grid import palette
from factorkit.utils.errors import ConfigError, DataError, format_count
from factorkit.utils.images import images_to_pixels, unit_to_uint8

if TYPE_CHECKING:
    import viser

MAX_POINTS = 30_000
RENDER_SIDES = (64, 128, 256, 512)  # longer side in pixels of successive renders of one viewpoint
FRUSTUM_SIDE = 64  # longer side in pixels of the images in the frusta
FRUSTUM_SCALE = 0.06  # of the cameras' distance, or of the near plane's
RAYS_PER_CHUNK = 1 << 14  # between two chunks a render checks for a newer viewpoint
OPENGL_TO_OPENCV = torch.tensor([1.0, -1.0, -1.0])  # viser's cameras look along z with y down
CAMERA_COLOR, TRUE_COLOR = ((int(r), int(g), int(b)) for r, g, b in palette(2))


@dataclass(frozen=True)
class ViewerScene:
    """What the viewer shows.

    Attributes:
        step: of the training.
        field: as :func:`factorkit.render` takes it.
        views: with predicted poses.
        background: [3], behind the scene unless the field has its own background.
        true: true poses [V, 4, 4] of the views in the coordinates of the predicted ones, or None.
        lower: corner of the field's box.
        upper: opposite corner of the field's box.
    """

    step: int
    field: Field
    views: Views
    background: Tensor
    true: Tensor | None = None
    lower: Sequence[float] = (-1.0, -1.0, -1.0)
    upper: Sequence[float] = (1.0, 1.0, 1.0)

    @property
    def camera(self) -> CameraModel:
        """Maps between the world and the field's box."""
        return box_camera(self.views)


class Viewer:
    """A viser server that shows a scene until it is closed; a context manager.

    Args:
        scene: what to show first.
        port: to listen at; the next free one if it is in use. The attribute ``url`` has the result.

    Raises:
        ConfigError: viser is not installed.
    """

    def __init__(self, scene: ViewerScene, *, host: str = "127.0.0.1", port: int = 8080) -> None:
        self.server = _start_server(host, port)
        self.url = f"http://{host}:{self.server.get_port()}"
        self.renderer = RenderThread()
        gui = self.server.gui
        self._step = gui.add_markdown("")
        self._live = gui.add_checkbox("Live render", True, hint="Render the scene from the current viewpoint")
        self._boxes = {
            "/points": gui.add_checkbox("Points", False),
            "/predicted": gui.add_checkbox("Predicted cameras (blue)", True),
            "/true": gui.add_checkbox("True cameras (orange)", True),
        }
        self._nodes: dict[str, Any] = {}
        for name, box in self._boxes.items():
            box.on_update(lambda event, name=name: self._set_visible(name))  # type: ignore[misc]  # a default is not part of viser's type
        self._live.on_update(lambda event: self._request_all())
        self.server.on_client_connect(self._connect)
        self.server.on_client_disconnect(self.renderer.cancel)
        self.show(scene)

    def show(self, scene: ViewerScene) -> None:
        """Show another scene, or a later state of this one."""
        nodes, views = self.server.scene, scene.views
        nodes.set_up_direction("+z" if views.layout == "object" else "+y")
        self._set_initial_camera(views)
        self._boxes["/true"].visible = scene.true is not None
        with self.server.atomic():
            self._step.content = f"**Step {scene.step}**, {format_count(len(views), 'view')}"
            for name, box in self._boxes.items():
                if name in self._nodes:
                    self._nodes[name].remove()
                self._nodes[name] = nodes.add_frame(name, show_axes=False, visible=box.value)
            self._add_frusta("/predicted", view_poses(views), views, CAMERA_COLOR)
            if scene.true is not None:
                self._add_frusta("/true", scene.true, views, TRUE_COLOR)
        self.renderer.set_scene(scene)
        self._request_all()
        self._add_points(scene)

    def close(self) -> None:
        """Stop rendering and serving."""
        self.renderer.close()
        self.server.stop()

    def __enter__(self) -> Viewer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _add_points(self, scene: ViewerScene) -> None:
        if isinstance(scene.field, GaussianField):
            self.server.scene.add_gaussian_splats("/points/cloud", *scene.field.as_covariances())
            return
        try:
            upper = limit_depth(scene.upper, MAX_DEPTH, scene.camera)
            cloud = point_cloud(scene.field, scene.views, scene.lower, upper, MAX_POINTS)
        except DataError:  # early in training nothing is solid
            return
        side = max(b - a for a, b in zip(scene.lower, scene.upper, strict=True))
        if scene.camera.forward_facing:
            side = float(np.median(-cloud.points[:, 2]))
        self.server.scene.add_point_cloud("/points/cloud", cloud.points, cloud.colors, point_size=side / 300)

    def _add_frusta(self, name: str, poses: Tensor, views: Views, color: tuple[int, int, int]) -> None:
        pixels = images_to_pixels(views.resize(min(FRUSTUM_SIDE, max(views.size))).images)
        distance = float(poses[:, :3, 3].norm(dim=1).median()) if views.layout == "object" else 1.0
        scale = FRUSTUM_SCALE * distance or FRUSTUM_SCALE
        for i, pose in enumerate(poses.cpu()):
            fov, aspect = fov_and_aspect(views.intrinsics[i], *views.size)
            wxyz, position = to_viser(pose)
            self.server.scene.add_camera_frustum(
                f"{name}/{i:04d}",
                fov,
                aspect,
                scale=scale,
                thickness=0.05 * scale,
                color=color,
                image=pixels[i],
                wxyz=wxyz,
                position=position,
            )

    def _set_initial_camera(self, views: Views) -> None:
        """Place new clients behind and above the first camera, so that its frustum does not hide the scene."""
        pose, camera = view_poses(views)[0].cpu(), self.server.initial_camera
        eye, up, backward = pose[:3, 3], pose[:3, 1], pose[:3, 2]
        distance = float(eye.norm()) if views.layout == "object" else 1.0
        camera.position = tuple((eye + 0.3 * distance * (up + backward)).tolist())
        camera.look_at = tuple((eye - distance * backward).tolist())

    def _set_visible(self, name: str) -> None:
        self._nodes[name].visible = self._boxes[name].value

    def _connect(self, client: viser.ClientHandle) -> None:
        client.camera.on_update(lambda camera: self._request(client))
        self._request(client)

    def _request_all(self) -> None:
        for client in self.server.get_clients().values():
            self._request(client)

    def _request(self, client: viser.ClientHandle) -> None:
        if self._live.value:
            self.renderer.request(client)
        else:
            self.renderer.cancel(client)
            client.scene.set_background_image(None)


class RenderThread:
    """Renders for clients in a background thread: small at once, then larger while no newer request arrives."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._waiting: dict[int, Any] = {}  # clients by id, in the order of their requests
        self._scene: ViewerScene | None = None
        self._version = 0  # counts all changes; a render of an older version is out of date
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="factorkit viewer", daemon=True)
        self._thread.start()

    def set_scene(self, scene: ViewerScene) -> None:
        """Render this scene from now on."""
        with self._condition:
            self._scene = scene
            self._version += 1

    def request(self, client: Any) -> None:
        """Render for a viser client, from where its camera is when the render starts."""
        with self._condition:
            self._waiting[client.client_id] = client
            self._version += 1
            self._condition.notify()

    def cancel(self, client: Any) -> None:
        """Drop the requests of a client."""
        with self._condition:
            self._waiting.pop(client.client_id, None)
            self._version += 1

    def close(self) -> None:
        """Stop the thread and wait for its end."""
        with self._condition:
            self._closed = True
            self._version += 1
            self._condition.notify()
        self._thread.join()

    def _work(self) -> None:
        scene: ViewerScene | None = None
        sampling: Sampling | None = None
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._closed or (self._waiting and self._scene is not None))
                if self._closed or self._scene is None:
                    return
                version = self._version
                client = self._waiting.pop(next(iter(self._waiting)))
                if scene is not self._scene:
                    scene, sampling = self._scene, None
            if sampling is None:
                sampling = viewer_sampling(scene.field, scene.lower, scene.upper)
            self._render_for(client, scene, sampling, version)

    def _render_for(self, client: Any, scene: ViewerScene, sampling: Sampling, version: int) -> None:
        """Send renders of growing size until one is out of date; the first one is always sent."""
        camera = client.camera
        pose = from_viser(camera.wxyz, camera.position)
        for side in RENDER_SIDES:
            if camera.aspect < 1:
                height, width = side, max(1, round(side * camera.aspect))
            else:
                height, width = max(1, round(side / camera.aspect)), side
            stop = None if side == RENDER_SIDES[0] else (lambda: self._version != version)
            pixels = render_viewpoint(scene, sampling, pose, camera.fov, height, width, stop)
            if pixels is None:
                return
            client.scene.set_background_image(pixels, format="jpeg")


@torch.no_grad()
def render_viewpoint(
    scene: ViewerScene,
    sampling: Sampling,
    pose: Tensor,
    fov: float,
    height: int,
    width: int,
    stop: Callable[[], bool] | None = None,
) -> np.ndarray | None:
    """Render one viewpoint as uint8 [height, width, 3].

    Args:
        scene: what to render.
        sampling: of the scene's field.
        pose: camera-to-world, [4, 4].
        fov: vertical field of view in radians.
        stop: called between chunks; True ends the render, which then returns None.
    """
    focal = height / (2 * math.tan(fov / 2))
    intrinsics = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    device = field_device(scene.field)
    fixed_background, camera = scene.background.to(device), scene.camera
    if isinstance(scene.field, ImageField):
        lens = intrinsics.to(device) / torch.tensor([width, height, 1], device=device)[:, None]
        seen = replace(camera, background=fixed_background, intrinsics=lens)
        return unit_to_uint8(render_views(scene.field, pose.to(device), seen, (height, width), 1).color)
    rays = image_rays(pose.to(device), intrinsics.to(device), height, width)
    behind = camera.forward_facing & (rays.directions[..., 2] > MAX_DIRECTION_Z)  # empty in forward-facing scenes
    ndc = camera.to_ndc(rays, (height, width))
    chunks = (x.reshape(-1, 3).split(RAYS_PER_CHUNK) for x in (ndc.origins, ndc.directions, rays.directions))
    colors = []
    for origins, directions, world_directions in zip(*chunks, strict=True):
        if stop is not None and stop():
            return None
        learned = getattr(scene.field, "background", None)
        background = fixed_background if learned is None else learned(world_directions)
        rendered = render(
            scene.field, type(rays)(origins, directions), sampling, background=background, early_stop=1e-2
        )
        colors.append(rendered.color)
    color = torch.cat(colors).reshape(height, width, -1)
    return unit_to_uint8(torch.where(behind[..., None], fixed_background, color))


def to_viser(pose: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return quaternion (w, x, y, z) and position of a camera-to-world matrix [4, 4] for viser."""
    rotation = roma.special_procrustes(pose[:3, :3].double() * OPENGL_TO_OPENCV.double())
    return roma.quat_xyzw_to_wxyz(roma.rotmat_to_unitquat(rotation)).numpy(), pose[:3, 3].double().numpy()


def from_viser(wxyz: np.ndarray, position: np.ndarray) -> Tensor:
    """Return the camera-to-world matrix [4, 4], in OpenGL's axes, of a viser camera."""
    rotation = roma.unitquat_to_rotmat(roma.quat_normalize(roma.quat_wxyz_to_xyzw(torch.as_tensor(wxyz).double())))
    pose = torch.eye(4)
    pose[:3, :3] = rotation.float() * OPENGL_TO_OPENCV
    pose[:3, 3] = torch.as_tensor(position).float()
    return pose


def fov_and_aspect(intrinsics: Tensor, height: int, width: int) -> tuple[float, float]:
    """Return the vertical field of view in radians and the aspect ratio of a camera's image."""
    fx, fy = intrinsics[0, 0].item(), intrinsics[1, 1].item()
    return 2 * math.atan(height / (2 * fy)), (width / fx) / (height / fy)


def _start_server(host: str, port: int) -> viser.ViserServer:
    try:
        import viser
    except ImportError as error:
        raise ConfigError(f"the viewer needs viser: pip install 'factorkit[viewer]' ({error})") from error
    return viser.ViserServer(host=host, port=port, label="factorkit", verbose=False)
