"""A web site for flows: pages that are slow, covered, redirecting, broken, or gone."""

from __future__ import annotations

import socketserver
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler
from typing import Any

LOGIN = """<form id="form" method="post" action="/login">
  <input id="email" name="email"><input id="pin" name="pin" type="password">
  <input id="shown-password" name="shown">
  <input id="agree" type="checkbox"><button id="go">Log in</button></form>"""

PAGES = {
    "/": "<title>Home</title><h1>Welcome</h1><a id='popup' href='/second' target='_blank'>second</a>",
    "/second": "<title>Second</title><h1 id='second'>The second page</h1>",
    "/login": f"<title>Log in here</title>{LOGIN}",
    "/slow": """<title>Slow</title><p id="late" hidden>Here at last</p><ul></ul><script>
      setTimeout(() => { late.hidden = false; document.title = "Done";
        history.pushState(0, "", "/slow/done");
        for (const word of ["a", "b"]) document.querySelector("ul").innerHTML += `<li>${word}</li>` }, 300);
      </script><div id="early">soon gone</div>
      <script>setTimeout(() => early.remove(), 300)</script>""",
    "/frame": "<title>Outside</title><iframe id='inner' src='/login'></iframe>",
    "/alert": """<title>Alert</title><button id="ask" onclick="alert('Are you there?');
      document.title = confirm('Really?') ? 'accepted' : 'dismissed'">ask</button>""",
    "/errors": """<title>Errors</title><div class="error" style="display:none">hidden</div>
      <div class="alert-danger"> </div><p class="note" role="status">Not an error</p>""",
    "/trouble": """<title>Trouble</title><div class="error-message">The  name
      is taken</div><p class="warning">Careful</p>""",
    "/covered": """<title>Covered</title><button id="under" onclick="document.title='clicked'">under</button>
      <div id="veil" style="position:fixed;inset:0;background:#0003"></div>
      <button id="off" disabled>off</button><span id="nothing" hidden>nothing</span>""",
    "/script": "<title>Script</title><script>null.boom</script>",
    "/busy": "<title>Busy</title><button id='spin' onclick='for(;;);'>spin</button>",
}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Site

    def do_GET(self) -> None:
        path = urllib.parse.urlsplit(self.path).path
        self.server.paths.append(self.path)
        if path == "/redirect":
            self.answer(302, "", Location="/second")
        elif path == "/circle":
            self.answer(302, "", Location="/circle")
        elif path == "/hang":
            self.server.released.wait()
        elif path == "/late":  # more than the 8 s that a step has for an element
            time.sleep(9)
            self.answer(200, f"{PAGES['/covered']}<script>setTimeout(() => veil.remove(), 9000)</script>")
        elif path == "/admin/login":
            self.answer(200, PAGES["/login"])
        elif path == "/unavailable":
            self.answer(503, "<title>503</title>not up yet")
        elif path == "/gone":  # the answer is cut off, and nobody answers any more
            self.server.leave()
            self.close_connection = True
        else:
            page = PAGES.get(path)
            self.answer(200 if page else 404, page or "<title>404</title>no such page")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.posted.append(body)
        pin = urllib.parse.parse_qs(body).get("pin", [""])[0]
        # An application that is careless with passwords: in its address, and in its text.
        self.answer(200, f"<title>In</title><h1 id='in'>Your PIN is {pin}</h1><p class='error'>{pin}!</p>")

    def answer(self, status: int, body: str, **headers: str) -> None:
        data = body.encode()
        self.send_response(status)
        for name, value in {"Content-Type": "text/html; charset=utf-8", **headers}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        pass


class Site(socketserver.ThreadingTCPServer):
    """The pages on a free port of loopback, as a context manager."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.paths: list[str] = []
        self.posted: list[str] = []
        self.released = threading.Event()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def leave(self) -> None:
        """Stop listening; the port refuses connections from now on."""
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: Any) -> None:
        """A browser that closes early is no news."""

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self.shutdown()
        self.server_close()
