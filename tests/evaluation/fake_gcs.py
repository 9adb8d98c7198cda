"""The part of Google Cloud Storage's JSON API that TensorStore uses, in memory, at a free port.

    python fake_gcs.py

prints its URL. Buckets have their behaviour by name: `bucket` works, `unlistable` except that its
objects cannot be listed, `flaky` except that every other request fails, `forbidden` and
`overloaded` refuse everything, `silent` never answers, and no others exist.
"""

import http.server
import itertools
import json
import re
import threading
import urllib.parse

PATH = re.compile(r"(?:/upload)?/storage/v1/b/([^/]+)/o(?:/([^/]+))?")
PAGE_SIZE = 7

objects = {}
"""Content and generation by bucket and name."""
generations = itertools.count(1)
requests = itertools.count()
lock = threading.Lock()


def refuse(bucket, name):
    """The status with which a request is refused; None if it is not."""
    match bucket:
        case "bucket":
            return None
        case "unlistable":
            return None if name else 403
        case "flaky":
            return 503 if next(requests) % 2 else None
        case "silent":
            threading.Event().wait()
        case _:
            return {"forbidden": 403, "overloaded": 503}.get(bucket, 404)


def describe(name, content, generation):
    return {"name": name, "generation": str(generation), "size": str(len(content))}


def list_objects(bucket, query):
    first = bytes.fromhex(query.get("pageToken", "")).decode() or query.get("startOffset", "")
    end = query.get("endOffset", "\U0010ffff")
    names = sorted(name for place, name in objects if place == bucket and first <= name < end)
    page = {"items": [describe(name, *objects[bucket, name]) for name in names[:PAGE_SIZE]]}
    if names[PAGE_SIZE:]:
        page["nextPageToken"] = names[PAGE_SIZE].encode().hex()
    return page


def answer(method, bucket, name, query, body):
    """Status, body and generation."""
    if not name:
        return 200, list_objects(bucket, query), 0
    content, generation = objects.get((bucket, name), (None, 0))
    if int(query.get("ifGenerationMatch", generation)) != generation:
        return 412, b"", 0
    if method == "POST":
        objects[bucket, name] = body, next(generations)
        return 200, describe(name, *objects[bucket, name]), 0
    if content is None:
        return 404, b"", 0
    if method == "DELETE":
        del objects[bucket, name]
        return 204, b"", 0
    if int(query.get("ifGenerationNotMatch", -1)) == generation:
        return 304, b"", 0
    return 200, content, generation


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_any(self):
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query))
        bucket, name = PATH.fullmatch(url.path).groups()
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        if len(body) < length:  # the sender was killed
            self.close_connection = True
            return
        name = query.get("name") or urllib.parse.unquote(name or "")
        if status := refuse(bucket, name):
            content, generation = {"error": {"message": f"{bucket} says no"}}, 0
        else:
            with lock:
                status, content, generation = answer(self.command, bucket, name, query, body)
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("x-goog-generation", str(generation))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_DELETE = do_any  # noqa: N815

    def log_message(self, *arguments):
        pass


if __name__ == "__main__":
    server = http.server.ThreadingHTTPServer(("localhost", 0), Handler)
    print(f"http://localhost:{server.server_port}", flush=True)
    server.serve_forever()
