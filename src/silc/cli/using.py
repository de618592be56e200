"""Verbs for pictures and words: what a model is for.

Gives: heatmap, segment, search, demo.
Used by: the command line's table of verbs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro


def heatmap(args: list[str]) -> None:
    """Show where a picture matches each text."""

    def run(
        model: tyro.conf.Positional[str],
        image: tyro.conf.Positional[Path],
        text: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["-t"])],
        out: Path = Path("heatmap.png"),
        how: str = "whole-image",
    ) -> None:
        """Draw the patch-text map of a picture for each text, side by side.

        Args:
            model: Anything that silc.load opens.
            image: A picture.
            text: What to look for: `-t "a red apple" "a dog"`.
            out: The PNG to write.
            how: The segmentation protocol whose size, windows and read-out are used: whole-image, tcl, tips, ...
        """
        from silc.app.overlays import overlay_heatmap
        from silc.opening import load
        from silc.predict import Predictor

        maps = Predictor(load(model)).heatmap(image, list(text), how=how)
        overlay_heatmap(image, maps, text).save(out)
        print(f"wrote {out}")

    tyro.cli(run, args=args, prog="silc heatmap")


def segment(args: list[str]) -> None:
    """Say which of some classes every pixel of a picture, a folder or a video belongs to."""

    def run(
        source: tyro.conf.Positional[Path],
        classes: tyro.conf.Positional[str],
        model: str,
        out: Path = Path("segmented"),
        how: str = "auto",
        background: float | None = None,
        arrays: bool = False,
        every: int = 1,
        device: str = "auto",
    ) -> None:
        """Write, for every picture, an overlay with legend, a label map (PNG with palette), and scores by class (JSON).

        Args:
            source: A picture, a folder of pictures, an animation, or a video (needs silc[video]).
            classes: What to look for, in your own words, with commas: "road, car, tree".
            model: Anything that silc.load opens; one with a CAT-Seg head uses it, any other goes without training.
            out: Folder for NAME.png, NAME.labels.png and NAME.json.
            how: The protocol; auto: catseg for a model with a head, else whole-image. Also tcl, tips, maskclip, ...
            background: Pixels whose best score (0 to 1) is lower belong to no class, and are black.
            arrays: Write all scores too, NAME.npy: float16 [classes, height, width].
            every: Of an animation or video, every Nth frame.
            device: auto, cpu, cuda or cuda:1.
        """
        from silc.app.segmenting import segment as write

        labels = [label.strip() for label in classes.split(",") if label.strip()]
        done = write(model, source, labels, out, how, background, arrays, every, device)
        print(f"wrote {done} picture{'s' * (done != 1)} to {out}: NAME.png (overlay), NAME.labels.png, NAME.json")

    tyro.cli(run, args=args, prog="silc segment")


def search(args: list[str]) -> None:
    """Find pictures in a folder by words, or by another picture."""

    def run(
        folder: tyro.conf.Positional[Path],
        queries: Annotated[
            tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="QUERY [QUERY ...]", help_behavior_hint="")
        ],
        model: str,
        top: int = 10,
        out: Path | None = None,
        cache: Path | None = None,
        device: str = "auto",
        batch: int = 64,
    ) -> None:
        """Rank the pictures of a folder by how well they fit each query: `silc search photos/ "a red apple" --model M`.

        The first search looks at every picture; later ones look only at what is new or changed. Nothing is written into
        the folder. Pictures that cannot be read are told and left out.

        Args:
            folder: Your pictures; folders in it are searched too, but not hidden ones, nor links to folders.
            queries: One or more: words ("a red apple"), or picture files to search by their look (other.jpg).
            model: Anything that silc.load opens; `small` comes with silc.
            top: How many pictures to show for each query.
            out: Folder for search.html, a page with thumbnails, and results.json.
            cache: Folder that keeps what was embedded; without it, $XDG_CACHE_HOME/silc/search or ~/.cache/silc/search.
            device: auto, cpu, cuda or cuda:1.
            batch: Pictures that the model looks at together.
        """
        from silc.app.search_command import search as find

        find(model, folder, queries, top, out, cache, device, batch)
        if out:
            print(f"wrote {out / 'search.html'} and {out / 'results.json'}")

    tyro.cli(run, args=args, prog="silc search")


def demo(args: list[str]) -> None:
    """Show in the browser what a model sees: maps of texts, patches that look alike, classes of pixels, labels."""

    def run(
        model: tyro.conf.Positional[str] = "small",
        pictures: Path | None = None,
        host: str = "127.0.0.1",
        port: int = 7860,
        open: bool = False,
        device: str = "auto",
    ) -> None:
        """Serve a page to this machine alone, until Ctrl-C: bring a picture, or take one of the page's own, and ask.

        It needs no network, and nothing leaves the machine. On another machine than the one before you, forward its
        port: `ssh -L 7860:localhost:7860 MACHINE`, then open http://localhost:7860 here.

        Args:
            model: Anything that silc.load opens; without one, small, the model that comes with silc.
            pictures: A folder that the page searches by words too; it is embedded first, and kept for the next time.
            host: The address to listen at. Any other than this machine's own lets others in, without a password.
            port: The port; 0 takes any that is free.
            open: Open the page in the browser.
            device: auto, cpu, cuda or cuda:1.
        """
        from silc.app.demo import serve

        serve(model, host, port, pictures, open, device)

    tyro.cli(run, args=args, prog="silc demo")
