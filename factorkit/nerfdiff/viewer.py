"""A browser window into a scene: its points, the cameras with their pictures, and a render from where one stands."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import roma
import torch
from torch import Tensor

from factorkit.data.views.views import Views
from factorkit.nerfdiff.export.mesh import FAR, point_cloud
from factorkit.nerfdiff.fields.occupancy import device_of, occupied_sampling
from factorkit.nerfdiff.rays import Optics, within
from factorkit.nerfdiff.scene import field_space
from factorkit.rendering.cameras import image_rays
from factorkit.rendering.ndc import MAX_DIRECTION_Z
from factorkit.rendering.render import Field, render
from factorkit.report.image_grid import palette
from factorkit.utils.errors import ConfigError, DataError
from factorkit.utils.images import images_to_pixels, unit_to_uint8

if TYPE_CHECKING:
    import viser

POINTS = 30_000
SIDES = (64, 128, 256, 512)  # pixels along the longer side: the first is there at once, the next while one stands still
PICTURE = 64  # pixels of the pictures in the frusta
FRUSTUM = 0.06  # of the cameras' distance, or of the nearest plane's
RAYS = 1 << 14  # rendered at once; between two such parts a newer viewpoint is noticed
TO_OPENCV = torch.tensor([1.0, -1.0, -1.0])  # viser's cameras look along z, y down
FOUND, TRUE = (tuple(int(x) for x in color) for color in palette(2))


@dataclass(frozen=True)
class Shown:
    """What the viewer shows.

    Attributes:
        step: of the training.
        field: as :func:`factorkit.render` takes it.
        views: the pictures at their found poses, in the space of ``true`` too.
        background: [3], behind everything, unless the field has a background of its own.
        true: the true poses [V, 4, 4] of the same views, brought over the found ones, or None.
        lower, upper: corners of the field's box outside of which it is not asked.
    """

    step: int
    field: Field
    views: Views
    background: Tensor
    true: Tensor | None = None
    lower: Sequence[float] = (-1.0, -1.0, -1.0)
    upper: Sequence[float] = (1.0, 1.0, 1.0)

    @property
    def space(self) -> Optics:
        """What leads from the cameras' space to the field's box."""
        return field_space(self.views)


class Viewer:
    """A viser server that shows a scene until it is closed; a context manager. ``url`` is where; a port that is taken
    makes it the next free one.

    Raises:
        ConfigError: viser is not installed.
    """

    def __init__(self, shown: Shown, *, host: str = "127.0.0.1", port: int = 8080) -> None:
        self.server = _server(host, port)
        self.url = f"http://{host}:{self.server.get_port()}"
        self.painter = Painter()
        gui = self.server.gui
        self._step = gui.add_markdown("")
        self._live = gui.add_checkbox("Live render", True, hint="Render the scene from where you stand")
        self._boxes = {
            "/points": gui.add_checkbox("Points", False),
            "/found": gui.add_checkbox("Found cameras (blue)", True),
            "/true": gui.add_checkbox("True cameras (orange)", True),
        }
        self._nodes: dict[str, Any] = {}
        for name, box in self._boxes.items():
            box.on_update(lambda event, name=name: self._set_visible(name))  # type: ignore[misc]
        self._live.on_update(lambda event: self._toggle_live())
        self.server.on_client_connect(self._connected)
        self.server.on_client_disconnect(self.painter.forget)
        self.show(shown)

    def show(self, shown: Shown) -> None:
        """Show another scene, or a later state of this one."""
        scene, views = self.server.scene, shown.views
        scene.set_up_direction("+z" if views.layout == "object" else "+y")
        self._aim(views)
        with self.server.atomic():
            self._step.content = f"**Step {shown.step}**, {len(views)} views"
            for name, box in self._boxes.items():
                if name in self._nodes:
                    self._nodes[name].remove()
                self._nodes[name] = scene.add_frame(name, show_axes=False, visible=box.value)
            self._cameras("/found", views.poses, views, FOUND)
            if shown.true is not None:
                self._cameras("/true", shown.true, views, TRUE)
        self.painter.look(shown)
        self._toggle_live()
        self._points(shown)

    def close(self) -> None:
        """Stop rendering and serving."""
        self.painter.close()
        self.server.stop()

    def __enter__(self) -> Viewer:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _points(self, shown: Shown) -> None:
        try:
            upper = within(shown.upper, FAR, shown.space)
            cloud = point_cloud(shown.field, shown.views, shown.lower, upper, POINTS)
        except DataError:  # early in training nothing is solid yet
            return
        side = max(b - a for a, b in zip(shown.lower, shown.upper, strict=True))
        if shown.space.forward:
            side = float(np.median(-cloud.points[:, 2]))
        self.server.scene.add_point_cloud("/points/cloud", cloud.points, cloud.colors, point_size=side / 300)

    def _cameras(self, name: str, poses: Tensor, views: Views, color: tuple[int, ...]) -> None:
        small = views.resize(min(PICTURE, max(views.size)))
        pictures = images_to_pixels(small.images)
        away = float(poses[:, :3, 3].norm(dim=1).median()) if views.layout == "object" else 1.0
        scale = FRUSTUM * away or FRUSTUM
        for i, pose in enumerate(poses.cpu()):
            fov, aspect = frustum(views.intrinsics[i], *views.size)
            wxyz, position = to_viser(pose)
            self.server.scene.add_camera_frustum(
                f"{name}/{i:04d}",
                fov,
                aspect,
                scale=scale,
                thickness=0.05 * scale,
                color=color,
                image=pictures[i],
                wxyz=wxyz,
                position=position,
            )

    def _aim(self, views: Views) -> None:
        """Newcomers begin a little behind the first camera."""
        pose, camera = views.poses[0].cpu(), self.server.initial_camera
        eye, back = pose[:3, 3], pose[:3, 2]
        distance = float(eye.norm()) if views.layout == "object" else 1.0
        camera.position = tuple((eye + 0.3 * distance * back).tolist())
        camera.look_at = tuple((eye - distance * back).tolist())

    def _set_visible(self, name: str) -> None:
        self._nodes[name].visible = self._boxes[name].value

    def _connected(self, client: viser.ClientHandle) -> None:
        client.camera.on_update(lambda camera: self._ask(client))
        self._ask(client)

    def _toggle_live(self) -> None:
        for client in self.server.get_clients().values():
            self._ask(client)

    def _ask(self, client: viser.ClientHandle) -> None:
        if self._live.value:
            self.painter.ask(client)
        else:
            self.painter.forget(client)
            client.scene.set_background_image(None)


class Painter:
    """Renders for clients in a thread of its own: small at once, larger while nothing newer is asked for."""

    def __init__(self) -> None:
        self._news = threading.Condition()
        self._waiting: dict[int, Any] = {}  # clients by their number, in the order they asked
        self._shown: Shown | None = None
        self._asked = 0
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="factorkit viewer", daemon=True)
        self._thread.start()

    def look(self, shown: Shown) -> None:
        """Render this from now on."""
        with self._news:
            self._shown = shown
            self._asked += 1

    def ask(self, client: Any) -> None:
        """Render for a viser client, from where its camera is when its turn comes."""
        with self._news:
            self._waiting[client.client_id] = client
            self._asked += 1
            self._news.notify()

    def forget(self, client: Any) -> None:
        """Do not render for it any more."""
        with self._news:
            self._waiting.pop(client.client_id, None)
            self._asked += 1

    def close(self) -> None:
        with self._news:
            self._closed = True
            self._asked += 1
            self._news.notify()
        self._thread.join()

    def _work(self) -> None:
        shown = sampling = None
        while True:
            with self._news:
                self._news.wait_for(lambda: self._closed or (self._waiting and self._shown is not None))
                if self._closed:
                    return
                asked = self._asked
                client = self._waiting.pop(next(iter(self._waiting)))
                if shown is not self._shown:
                    shown, sampling = self._shown, None
            if sampling is None:
                sampling = occupied_sampling(shown.field, shown.lower, shown.upper)
            self._paint(shown, sampling, client, lambda asked=asked: self._asked != asked)  # type: ignore[misc]

    def _paint(self, shown: Shown, sampling, client: Any, newer: Callable[[], bool]) -> None:
        """Send pictures of growing size until one of them is out of date, the first one in any case."""
        camera = client.camera
        pose = from_viser(camera.wxyz, camera.position)
        for side in SIDES:
            height, width = (
                (side, max(1, round(side * camera.aspect)))
                if camera.aspect < 1
                else (max(1, round(side / camera.aspect)), side)
            )
            picture = paint(shown, sampling, pose, camera.fov, height, width, newer if side > SIDES[0] else None)
            if picture is None:
                return
            client.scene.set_background_image(picture, format="jpeg")


@torch.no_grad()
def paint(
    shown: Shown, sampling, pose: Tensor, fov: float, height: int, width: int, stop: Callable[[], bool] | None = None
) -> np.ndarray | None:
    """What a camera at ``pose`` [4, 4] with the vertical angle ``fov`` in radians sees: uint8 [height, width, 3]; None
    where ``stop`` said so on the way."""
    focal = height / (2 * math.tan(fov / 2))
    k = torch.tensor([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1]])
    device, background = device_of(shown.field), shown.background.to(device_of(shown.field))
    rays, space = image_rays(pose.to(device), k.to(device), height, width), shown.space
    lost = space.forward & (rays.directions[..., 2] > MAX_DIRECTION_Z)  # there is nothing behind forward-facing cameras
    bent = space.bent(rays, (height, width))
    each = (x.reshape(-1, 3).split(RAYS) for x in (bent.origins, bent.directions, rays.directions))
    colors = []
    for part in zip(*each, strict=True):
        if stop is not None and stop():
            return None
        own = getattr(shown.field, "background", None)
        behind = background if own is None else own(part[2])
        seen = render(shown.field, type(rays)(*part[:2]), sampling, background=behind, early_stop=1e-2)
        colors.append(seen.color)
    picture = torch.where(lost[..., None], background, torch.cat(colors).reshape(height, width, -1))
    return unit_to_uint8(picture)


def to_viser(pose: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Quaternion (w, x, y, z) and place of a camera-to-world matrix [4, 4] for viser."""
    turn = roma.special_procrustes(pose[:3, :3].double() * TO_OPENCV.double())
    return roma.quat_xyzw_to_wxyz(roma.rotmat_to_unitquat(turn)).numpy(), pose[:3, 3].double().numpy()


def from_viser(wxyz: np.ndarray, position: np.ndarray) -> Tensor:
    """The camera-to-world matrix [4, 4], OpenGL's axes, of a viser camera."""
    turn = roma.unitquat_to_rotmat(roma.quat_normalize(roma.quat_wxyz_to_xyzw(torch.as_tensor(wxyz).double())))
    pose = torch.eye(4)
    pose[:3, :3] = turn.float() * TO_OPENCV
    pose[:3, 3] = torch.as_tensor(position).float()
    return pose


def frustum(intrinsics: Tensor, height: int, width: int) -> tuple[float, float]:
    """Vertical angle in radians and aspect ratio of a camera's picture."""
    fx, fy = intrinsics[0, 0].item(), intrinsics[1, 1].item()
    return 2 * math.atan(height / (2 * fy)), (width / fx) / (height / fy)


def _server(host: str, port: int) -> viser.ViserServer:
    try:
        import viser
    except ImportError as error:
        raise ConfigError(f"the viewer needs viser: pip install 'factorkit[viewer]' ({error})") from error
    return viser.ViserServer(host=host, port=port, label="factorkit", verbose=False)
