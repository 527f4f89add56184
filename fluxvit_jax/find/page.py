"""The page of what was found: films that play from the moment on, with a picture of it."""

import html
import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import cv2

from fluxvit_jax.data.decoding import DecodeError, Video
from fluxvit_jax.data.frame_sampling import resized_size
from fluxvit_jax.data.time_limit import within
from fluxvit_jax.deploy.page import data_uri
from fluxvit_jax.distributed import storage
from fluxvit_jax.find.index_file import Index, Moment
from fluxvit_jax.find.search import Found
from fluxvit_jax.reports import style
from fluxvit_jax.reports.elements import document, notes
from fluxvit_jax.reports.wording import count

POSTER_SIDE, POSTER_SECONDS = 360, 30.0  # short side in pixels; limit of reading one

CSS = (
    style.colors(style.LIGHT, style.DARK)
    + style.BASE
    + style.ELEMENTS
    + """
.found {
  display: grid; gap: 1rem; margin-top: 1.5rem; list-style: none;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr));
}
video {
  display: block; width: 100%; aspect-ratio: 16 / 9; object-fit: contain; background: #000;
  border-radius: 0.375rem; margin-bottom: 0.625rem;
}
.line { display: flex; justify-content: space-between; gap: 0.75rem; }
.line b { white-space: nowrap; }
"""
)


def write(path: Path, words: str, index: Index, found: Sequence[Found], videos: str) -> None:
    """Writes the page of a search; it plays the films from where they are.

    videos: the folder of the index's videos. Raises OSError.
    """
    folder = path.absolute().parent
    items, unread = [], []
    for one in found:
        film = os.path.join(videos, one.file)
        try:
            poster = _poster(film, one.moment)
        except DecodeError as error:
            poster = ""
            unread.append(f"{storage.display_name(one.file)}: {error.reason}")
        items.append(_item(one, _address(film, folder, one.moment), poster))
    settings = index.settings
    legend = (
        f"{count(len(found), 'moment')} of {count(len(index), 'moment')} in "
        f"{count(len(index.moments), 'video')}, by their cosines with the words, at "
        f"{count(settings.tokens, 'token')} of {settings.frames} frames of {settings.resolution} px"
    )
    header = f'<p class="legend">{legend}</p>\n{notes(unread)}'
    content = f'<ol class="found">\n{"".join(items)}</ol>\n'
    path.write_text(document(words, CSS, header, content), encoding="utf-8")


def seconds(moment: Moment) -> str:
    """The time of a moment, such as "1:02:03.0 to 1:02:11.0"."""
    return f"{_clock(moment.start)} to {_clock(moment.end)}" if moment.end else "whole video"


def _clock(time: float) -> str:
    """Seconds as minutes and seconds, with hours where there are any."""
    minutes, rest = divmod(round(time, 1), 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02}:{rest:04.1f}" if hours else f"{minutes}:{rest:04.1f}"


def _item(one: Found, address: str, poster: str) -> str:
    name = html.escape(storage.display_name(one.file))
    picture = f' poster="{poster}"' if poster else ""
    return f"""<li class="card">
<video controls preload="none" src="{html.escape(address)}"{picture}></video>
<p class="line"><span>{name}</span> <b>{one.cosine:.3f}</b></p>
<p class="small">{seconds(one.moment)}</p>
</li>
"""


def _address(film: str, folder: Path, moment: Moment) -> str:
    """The address of a moment of a film from a page in `folder`."""
    relative = os.path.relpath(os.path.abspath(film), folder)
    times = f"#t={moment.start:.3f},{moment.end:.3f}" if moment.end else ""
    return quote(os.fsencode(relative)) + times


def _poster(film: str, moment: Moment) -> str:
    """The frame in the middle of a moment, as an address that holds all of it."""

    def read() -> str:
        with Video(film) as video:
            middle = int((moment.start + moment.end) / 2 * video.frame_rate)
            (frame,) = video.read([min(middle, len(video) - 1)])
        height, width, _ = frame.shape
        if min(height, width) > POSTER_SIDE:
            rows, columns = resized_size(height, width, POSTER_SIDE)
            frame = cv2.resize(frame, (columns, rows), interpolation=cv2.INTER_AREA)
        return data_uri(frame)

    return within(POSTER_SECONDS, film, read)
