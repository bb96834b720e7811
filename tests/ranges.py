"""A web server of its own process, for files and parts of them: GDAL opens while Python waits."""

import http.server
import sys
from functools import partial
from pathlib import Path


def note(path):
    """Write down what was asked for."""
    with Path(sys.argv[2]).open("a") as file:
        file.write(path + "\n")


class _Ranges(http.server.SimpleHTTPRequestHandler):
    """Serves files and parts of them, and notes what it is asked for."""

    def do_GET(self):
        note(self.path)
        path = self.translate_path(self.path)
        try:
            data = open(path, "rb").read()  # noqa: PTH123, SIM115 - a small script
        except OSError:
            self.send_error(404)
            return
        wanted = self.headers.get("Range")
        first, last = 0, len(data) - 1
        if wanted:
            begin, _, end = wanted.removeprefix("bytes=").partition("-")
            first, last = int(begin), min(int(end or last), last)
        self.send_response(206 if wanted else 200)
        self.send_header("Content-Length", str(last - first + 1))
        self.send_header("ETag", f'"{hash(data)}"')
        if wanted:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
        self.end_headers()
        self.wfile.write(data[first : last + 1])

    def do_HEAD(self):
        note(self.path)
        super().do_HEAD()

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    handler = partial(_Ranges, directory=sys.argv[1])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        print(server.server_port, flush=True)  # noqa: T201 - how it tells its port
        server.serve_forever()
