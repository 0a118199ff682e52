"""A web server on this machine, from which the loaders download in tests."""

import contextlib
import dataclasses
import functools
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; `<name>.cut` promises the file and closes the connection halfway."""

    def log_message(self, *args) -> None:
        """Nothing: the log would mix with pytest's output."""

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        cut = Path(self.translate_path(self.path + ".cut"))
        if not cut.exists():
            return super().do_GET()
        content = cut.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[: len(content) // 2])
        self.close_connection = True


@dataclasses.dataclass
class Server:
    folder: Path
    url: str
    requests: list[str]


@contextlib.contextmanager
def serving(folder: Path) -> Iterator[Server]:
    folder.mkdir(parents=True, exist_ok=True)
    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        httpd.requests = []
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield Server(folder, f"http://127.0.0.1:{httpd.server_port}", httpd.requests)
        finally:
            httpd.shutdown()
            thread.join()


def nowhere() -> str:
    """An address at which nothing answers: a port that was just given back."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as closed:
        return f"http://127.0.0.1:{closed.server_port}"
