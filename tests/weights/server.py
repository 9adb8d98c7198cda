"""A web server on loopback that serves one file in as many ways as real servers do."""

import contextlib
import dataclasses
import http.server
import threading


@dataclasses.dataclass
class Site:
    """What the server has, how it behaves, and what it was asked.

    Attributes:
        content: of the file `/file.npz`; `/moved.npz` redirects there, and nothing else exists.
        etag: of that content; None for a server that tells no version.
        ranges: whether it serves parts of a file.
        stop_after: bytes of an answer after which it hangs up.
        asked: the ranges asked for, None where all of the file was.
    """

    content: bytes
    etag: str | None = '"1"'
    ranges: bool = True
    stop_after: int | None = None
    asked: list[str | None] = dataclasses.field(default_factory=list)
    url: str = ""


@contextlib.contextmanager
def serve(content):
    """A `Site` that answers until the body ends."""
    site = Site(content)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path == "/moved.npz":
                self.send_response(302)
                self.send_header("Location", "/file.npz")
                self.end_headers()
            elif self.path == "/file.npz":
                _send_file(self, site)
            else:
                self.send_error(404)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _send_file(handler, site):
    asked = handler.headers["Range"]
    site.asked.append(asked)
    partial = asked is not None and site.ranges and handler.headers["If-Range"] == site.etag
    start = int(asked.removeprefix("bytes=").removesuffix("-")) if partial else 0
    if partial and start >= len(site.content):
        handler.send_error(416)
        return
    body = site.content[start:]
    handler.send_response(206 if partial else 200)
    if partial:
        end = len(site.content)
        handler.send_header("Content-Range", f"bytes {start}-{end - 1}/{end}")
    if site.etag is not None:
        handler.send_header("ETag", site.etag)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body[: site.stop_after])
