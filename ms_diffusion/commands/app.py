"""A page in the browser that draws and edits with a run: `app runs/mine`. It is served to this machine alone, needs nothing
from any other, and sends nothing anywhere. Gradio makes it: `pip install 'ms_diffusion[app]'`."""

import os
import queue
import tempfile
import threading
import webbrowser
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from PIL import Image

from .. import images, plots2d
from ..data.points import TOYS, Normalizer
from ..denoiser import exact_denoiser
from ..fields import Bounds, check_fields
from ..process import DiffusionConfig
from ..runtime import DEVICES, STOP, Interrupted, UserError, command, defer_interrupts
from ..samplers import SAMPLERS
from ..sampling import Sampling
from ..training.pipeline import load
from ..training.runs import DEFAULT, Run, bundled_models
from ..training.tasks.base import Request
from ..training.tasks.images import ImageTask
from .parse import parse

SCALE = 280  # pixels of a picture that is painted on
OWN = "the run's own"  # of a sampler
TURN = "each in turn"  # of classes
# Name -> schedule, and spacing of its timesteps where it is not the sampler's own
PROCESSES = {"DDPM (cosine)": ("cosine", None), "rectified flow": ("flow", "trailing"), "EDM": ("edm", None)}
PLANE_SAMPLERS = tuple(name for name in SAMPLERS if name != "consistency")
# A page of another site must not reach this one, nor this page any other
POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'none'; form-action 'self'"
CSS = """.gradio-container {width: 100%; max-width: 1100px !important; margin: auto}
#picture img, #plane img {image-rendering: pixelated}"""

Frame = tuple[Any, ...]  # a value for each output of the page


@dataclass
class Args:
    """Serve a page that draws and edits with trained runs, on this machine alone."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    """Runs' folders or names of bundled models; by default all bundled models."""
    port: Annotated[int, Bounds(1, 65535)] = 7860
    """Port of 127.0.0.1 at which the page is."""
    browser: bool = False
    """Open the page in the browser."""
    device: Literal[DEVICES] = "auto"
    """Device: auto is Ascend, then GPU, then CPU."""
    debug: bool = False
    """Show the traceback of an error."""


class Studio:
    """The runs of the page, and the one thread that computes with them, since MindSpore is not made for several.

    Attributes:
        runs: name -> `Run`, of images.
        folder: What the page offers for download."""

    def __init__(self, names: Sequence[str], device: str, folder: str):
        self.thread, self.folder, self.files = ThreadPoolExecutor(1), Path(folder), count()
        self.jobs: dict[str | None, tuple[threading.Event, Future]] = {}  # by session: what stops it, and its end
        self.runs: dict[str, Run] = {}
        for name in names:
            run = self.thread.submit(load, name, device=device).result()
            if not isinstance(run.task, ImageTask):
                raise UserError(f"{name} draws no images, so it has no place on this page: leave it out")
            self.runs[name] = run

    def watch(self, session: str | None, job: Callable[[Callable], Frame]) -> Iterator[Frame]:
        """The frames make() of job(show), which calls show(make) while it computes, as fast as they are taken; then what it
        returns. It ends early by `stop(session)`, or when this iterator is closed."""
        stop, shown = threading.Event(), queue.Queue(1)

        def show(make: Callable[[], Frame]) -> None:
            if stop.is_set():
                raise Interrupted
            if shown.empty():  # this thread alone fills it
                shown.put(make())

        future = self.thread.submit(job, show)
        self.jobs[session] = stop, future
        try:
            while not future.done():
                with suppress(queue.Empty):
                    yield shown.get(timeout=0.1)
            yield future.result()
        finally:
            stop.set()
            if self.jobs.get(session) == (stop, future):
                del self.jobs[session]

    def stop(self, session: str | None) -> None:
        """Stop what is computed for a session, and wait until it has stopped: at its next step."""
        if job := self.jobs.get(session):
            job[0].set()
            wait([job[1]])

    def draw(self, name: str, request: Request, show: Callable) -> Frame:
        """A grid of what is asked for: (picture, what was done, path of the PNG, path of the .npz)."""
        run = self.runs[name]
        task: Any = run.task
        plan = task.plan(run, request)
        calls = len(plan.timesteps) * plan.calls_per_step

        def watch(i: int, x: Any, x_start: Any) -> None:
            def make() -> Frame:
                seen = images.to_uint8(task.decode(x_start.asnumpy()))
                picture = images.show_grid(seen, plan.gif_columns, plan.scale)
                return picture, f"step {min(i + 1, calls)} of {calls}", None, None

            show(make)

        x = plan.paste(task.decode(task.draw_plan(run, plan, watch)))
        picture = images.show_grid(images.to_uint8(plan.arrange(x)), plan.columns, plan.scale, plan.captions)
        path = self.folder / f"{next(self.files)}"
        picture.save(f"{path}.png")
        np.savez_compressed(f"{path}.npz", images=images.to_uint8(x))
        how = plan.sampling
        said = f"{name}, seed {how.seed}, {how.sampler}, {len(plan.timesteps)} steps, guidance {how.guidance:g}"
        return picture, said, f"{path}.png", f"{path}.npz"

    def plane(self, data: str, process: str, sampler: str, steps: int, seed: int, time: float, field: str,
            show: Callable) -> Frame:  # fmt: skip
        """The way from noise to points in the plane, with the exact denoiser: (points, what was done, field, paths)."""
        points = TOYS[data](np.random.default_rng(0), 1000).astype(np.float32)
        normalizer = Normalizer.of(points)
        schedule, spacing = PROCESSES[process]
        diffusion = DiffusionConfig(1000, schedule, "v", "l2").build(clip_denoised=False)
        denoise, decode = exact_denoiser(normalizer.normalize(points), diffusion), normalizer.denormalize
        rng, path = np.random.default_rng(seed), []
        timesteps = Sampling(sampler=sampler, steps=steps, spacing=spacing).timesteps(diffusion)

        def watch(i: int, x: np.ndarray, x_start: np.ndarray) -> None:
            path.append(decode(x))
            show(lambda: (plots2d.points_image(path[-1], points), f"step {min(i + 1, steps)} of {steps}", None, None))

        def noise_like(x: np.ndarray) -> np.ndarray:
            return rng.standard_normal(x.shape)

        x = rng.standard_normal((1000, 2))
        path.append(decode(x))
        SAMPLERS[sampler](denoise, x, diffusion, timesteps, noise_like, watch)
        drawn, paths = self.folder / f"{next(self.files)}.png", self.folder / f"{next(self.files)}.png"
        plots2d.save_trajectories(paths, {f"{sampler}, {steps} steps": np.stack(path)}, points)

        t = int(round(time * 999))
        alpha, sigma = diffusion.level(t)
        noised = alpha * normalizer.normalize(points) + sigma * rng.standard_normal(points.shape)
        grid = plots2d.grid_points(bounds := plots2d.limits(noised))
        x_start = denoise(grid, t)
        noise = (grid - alpha * x_start) / sigma
        arrows = -noise / sigma if field == "score" else diffusion.slopes[0][t] * x_start + diffusion.slopes[1][t] * noise
        plots2d.save_score_field(drawn, [(noised, grid, arrows)], [f"{field} at t = {t}"], bounds)
        said = f"{data}, {process}, {sampler}, {steps} steps, seed {seed}; the denoiser is exact"
        return plots2d.points_image(path[-1], points), said, Image.open(drawn), Image.open(paths)


def page(studio: Studio) -> Any:
    """The page, a gradio.Blocks."""
    import gradio as gr  # pyright: ignore[reportMissingImports]

    names = list(studio.runs)

    def watched(job: Callable, request: Any) -> Iterator[Frame]:
        """The frames of a job for the page; what is wrong with its input is said there."""
        try:
            yield from studio.watch(request.session_hash, job)
        except Interrupted:
            return
        except (UserError, ValueError) as e:
            raise gr.Error(str(e), print_exception=False) from e

    def shown(frame: Frame) -> Frame:
        return tuple(gr.skip() if value is None else value for value in frame)

    def asked(num: float, sampler: str, steps: float, guidance: float, seed: float, label: str, prompt: str) -> Request:
        """The request of the fields at the left; 0 and the run's own are its defaults."""
        options = {"sampler": None if sampler == OWN else sampler, "steps": int(steps) or None, "seed": int(seed)}
        sampling = Sampling(**options, guidance=None if guidance < 0 else float(guidance))
        class_ = None if label in (None, TURN) else label
        return Request(num=int(num), sampling=sampling, class_=class_, prompt=prompt or None)

    def draw(request: gr.Request, name: str, *fields: Any) -> Iterator[Frame]:
        wanted = asked(*fields)
        yield from map(shown, watched(lambda show: studio.draw(name, wanted, show), request))

    def save(picture: Any, mode: str, size: tuple[int, int]) -> str:
        """A picture of the page as a file of the run's size, of which each pixel is the mean of its own."""
        path = str(studio.folder / f"{next(studio.files)}.png")
        Image.fromarray(np.asarray(picture)).convert(mode).resize((size[1], size[0]), Image.Resampling.BOX).save(path)
        return path

    def inpaint(request: gr.Request, editor: Any, resample: float, name: str, *fields: Any) -> Iterator[Frame]:
        if not editor or editor.get("background") is None:
            raise gr.Error("choose a picture first", print_exception=False)
        layers = [np.asarray(layer)[..., 3] for layer in editor["layers"] if layer is not None]
        painted = np.max([layer > 0 for layer in layers], 0) if layers else np.zeros(1, bool)
        if not painted.any():
            raise gr.Error("paint over what is to be drawn anew first", print_exception=False)
        size, wanted = studio.runs[name].task.image_size, asked(*fields)
        mask = save(np.uint8(255 * painted), "L", size)
        wanted.inpaint, wanted.resample = (mask, save(editor["background"], "RGB", size)), int(resample)
        yield from map(shown, watched(lambda show: studio.draw(name, wanted, show), request))

    def interpolate(request: gr.Request, first: Any, second: Any, name: str, *fields: Any) -> Iterator[Frame]:
        if first is None or second is None:
            raise gr.Error("choose two pictures first", print_exception=False)
        size, wanted = studio.runs[name].task.image_size, asked(*fields)
        wanted.interpolate = save(first, "RGB", size), save(second, "RGB", size)
        yield from map(shown, watched(lambda show: studio.draw(name, wanted, show), request))

    def plane(request: gr.Request, data: str, process: str, sampler: str, steps: float, seed: float, time: float,
            field: str) -> Iterator[Frame]:  # fmt: skip
        numbers = int(steps), int(seed), time
        yield from map(shown, watched(lambda show: studio.plane(data, process, sampler, *numbers, field, show), request))

    def test_image(name: str, number: float) -> np.ndarray:
        try:
            pictures = studio.runs[name].task.test_images()
        except UserError as e:
            raise gr.Error(str(e), print_exception=False) from e
        picture = pictures[int(number) % len(pictures)]
        return np.asarray(Image.fromarray(picture.squeeze()).convert("RGB").resize((SCALE, SCALE), Image.Resampling.NEAREST))

    def describe(name: str) -> Frame:
        """The fields that depend on the run: its classes, whether it takes a prompt, a sampler and its steps."""
        labelling = studio.runs[name].task.labelling
        found = labelling.titles(np.arange(labelling.count)) if labelling.field == "labels" else None
        numbers = [str(i) for i in range(labelling.count)] if labelling.field == "labels" else []
        classes = gr.Dropdown(choices=[TURN, *(found or numbers)], value=TURN, visible=bool(numbers))
        is_fast = bool(getattr(studio.runs[name].config.train, "consistency", ()))
        how = (OWN, 0) if is_fast else ("dpmpp_2m", 15)
        return classes, gr.Textbox(visible=labelling.field not in (None, "labels")), *how

    def stop(request: gr.Request) -> None:
        studio.stop(request.session_hash)

    def stopped() -> str:
        return "stopped"

    def paint() -> Any:
        return gr.ImageEditor(
            label="Picture: paint over what is to be drawn anew",
            type="numpy",
            sources=["upload"],
            layers=False,
            transforms=None,
            brush=gr.Brush(default_size=30, colors=["#ff7043"], color_mode="fixed"),
            canvas_size=(SCALE, SCALE),
            fixed_canvas=True,
            height=440,
            elem_id="paint",
        )

    result: dict[str, Any] = {"format": "png", "interactive": False, "show_label": False, "buttons": ["fullscreen"]}
    with gr.Blocks(title="ms_diffusion", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        gr.Markdown("## ms_diffusion\nDrawn on this machine, by the runs that the command named or the bundled models.")
        with gr.Tabs():
            with gr.Tab("Pictures"), gr.Row():
                with gr.Column(scale=2, min_width=300):
                    name = gr.Dropdown(names, value=names[0], label="Run", visible=len(names) > 1)
                    label = gr.Dropdown([TURN], value=TURN, label="Class", elem_id="class")
                    prompt = gr.Textbox(label="Prompt", visible=False, elem_id="prompt")
                    seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1, elem_id="seed")
                    num = gr.Slider(1, 64, 20, step=1, label="Number of pictures", elem_id="num")
                    with gr.Accordion("Sampler", open=False):
                        sampler = gr.Dropdown([OWN, *SAMPLERS], value=OWN, label="Sampler", elem_id="sampler")
                        steps = gr.Number(0, label="Steps; 0 is the run's own", precision=0, minimum=0, elem_id="steps")
                        guidance = gr.Number(-1, label="Guidance; -1 is the run's own", minimum=-1, elem_id="guidance")
                    with gr.Tabs():
                        with gr.Tab("Draw"):
                            draw_button = gr.Button("Draw", variant="primary", elem_id="draw")
                        with gr.Tab("Inpaint"):
                            editor = paint()
                            with gr.Row():
                                test = gr.Number(0, label="Test image", precision=0, minimum=0, min_width=100)
                                take = gr.Button("Take it", min_width=100, elem_id="take")
                            resample = gr.Slider(1, 10, 1, step=1, label="RePaint (with ddpm): calls per step")
                            inpaint_button = gr.Button("Draw anew", variant="primary", elem_id="inpaint")
                        with gr.Tab("Interpolate"):
                            with gr.Row():
                                first, second = (
                                    gr.Image(label=f"Picture {i}", sources=["upload"], height=200, min_width=120)
                                    for i in (1, 2)
                                )
                            with gr.Row():
                                tests = [
                                    gr.Number(n, label="Test image", precision=0, minimum=0, min_width=100) for n in (9, 0)
                                ]
                            both = gr.Button("Take both", elem_id="both")
                            interpolate_button = gr.Button("Interpolate", variant="primary", elem_id="interpolate")
                with gr.Column(scale=3, min_width=300):
                    picture = gr.Image(elem_id="picture", **result)
                    status = gr.Markdown(elem_id="status")
                    with gr.Row():
                        stop_button = gr.Button("Stop", variant="stop", elem_id="stop")
                        png, npz = (gr.DownloadButton(kind, elem_id=kind.lower(), min_width=80) for kind in ("PNG", "NPZ"))
            with gr.Tab("Plane"), gr.Row():
                with gr.Column(scale=2, min_width=300):
                    toy = gr.Dropdown(list(TOYS), value="scurve", label="Points", elem_id="points")
                    process = gr.Dropdown(list(PROCESSES), value="rectified flow", label="Process")
                    way = gr.Dropdown(list(PLANE_SAMPLERS), value="ddim", label="Sampler")
                    plane_steps = gr.Slider(1, 200, 20, step=1, label="Steps")
                    plane_seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1)
                    time = gr.Slider(0, 1, 0.4, label="Time of the arrows: 0 is data, 1 is noise")
                    field = gr.Radio(["score", "velocity"], value="velocity", label="Arrows")
                    with gr.Row():
                        plane_button = gr.Button("Draw", variant="primary", elem_id="plane-draw")
                        plane_stop = gr.Button("Stop", variant="stop")
                with gr.Column(scale=3, min_width=300):
                    cloud = gr.Image(elem_id="plane", **result)
                    plane_status = gr.Markdown(elem_id="plane-status")
                    arrows = gr.Image(elem_id="arrows", **result)
                    paths = gr.Image(elem_id="paths", **result)

        fields, results = [name, num, sampler, steps, guidance, seed, label, prompt], [picture, status, png, npz]
        # One at a time: those who come later wait, and are told how long
        alone: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "compute", "api_visibility": "private"}
        alone |= {"show_progress": "minimal", "trigger_mode": "multiple"}  # else a click right after Stop would be lost
        of_plane = [toy, process, way, plane_steps, plane_seed, time, field], [cloud, plane_status, arrows, paths]
        quick: dict[str, Any] = {"queue": False, "api_visibility": "private"}
        drawing: list[Any] = [
            draw_button.click(draw, fields, results, **alone),
            inpaint_button.click(inpaint, [editor, resample, *fields], results, **alone),
            interpolate_button.click(interpolate, [first, second, *fields], results, **alone),
        ]
        moving = plane_button.click(plane, *of_plane, **alone)
        # What is said comes after the last step's own status, so it is an event of its own
        stop_button.click(stop, cancels=drawing, **quick).then(stopped, None, status, **quick)
        plane_stop.click(stop, cancels=[moving], **quick).then(stopped, None, plane_status, **quick)
        blocks.unload(stop)  # a page that is closed or loaded anew
        name.change(describe, name, [label, prompt, sampler, steps], **quick)
        blocks.load(describe, name, [label, prompt, sampler, steps], **quick)
        take.click(test_image, [name, test], editor, **quick)
        both.click(lambda name, *n: [test_image(name, i) for i in n], [name, *tests], [first, second], **quick)
    return blocks


def main(argv: Sequence[str]) -> int:
    args = parse(Args, argv, prog=command("app"))
    check_fields(args)
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "GRADIO_TEMP_DIR": folder}
        serve(args, folder)
    return 0


def serve(args: Args, folder: str) -> None:
    """Serve the page until Ctrl-C. Raises UserError if it cannot be."""
    import socket

    try:
        from gradio.themes import Default, Font  # pyright: ignore[reportMissingImports]
        from starlette.middleware import Middleware  # pyright: ignore[reportMissingImports]
        from starlette.middleware.trustedhost import TrustedHostMiddleware  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise UserError(f"the page needs the package {e.name}: pip install 'ms_diffusion[app]'") from e

    class Policy:
        """Adds `POLICY` to each answer."""

        def __init__(self, app: Any):
            self.app = app

        async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
            async def add(message: Any) -> None:
                if message["type"] == "http.response.start":
                    message["headers"] = [*message["headers"], (b"content-security-policy", POLICY.encode())]
                await send(message)

            await self.app(scope, receive, add)

    with socket.socket() as probe:  # before what takes long
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", args.port))
        except OSError as e:
            raise UserError(f"port {args.port} cannot be opened ({e.strerror}): choose another --port") from e
    # The default first, which the page begins with
    studio = Studio(args.runs or sorted(bundled_models(), key=DEFAULT.__ne__), args.device, folder)
    system = [Font("system-ui"), Font("sans-serif")]  # the default fonts would be fetched
    theme = Default(font=system, font_mono=[Font("monospace")])
    middleware = [Middleware(Policy), Middleware(TrustedHostMiddleware, allowed_hosts=["127.0.0.1", "localhost"])]
    blocks = page(studio)
    blocks.launch(
        server_name="127.0.0.1",
        server_port=args.port,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        max_file_size="20mb",
        footer_links=[],
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        app_kwargs={"middleware": middleware},
        theme=theme,
        css=CSS,
    )
    url = f"http://127.0.0.1:{args.port}"
    print(f"{url} (Ctrl-C ends it)", flush=True)
    if args.browser:
        webbrowser.open(url)
    defer_interrupts("stopping")
    STOP.wait()
    for session in list(studio.jobs):
        studio.stop(session)
    blocks.close()
