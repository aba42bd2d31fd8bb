"""Taskboard: projects and tasks behind a login, kept in PostgreSQL.

Pages are rendered on the server and need no JavaScript. Everything is configured by the environment:

    PGHOST, PGPORT, PGUSER, PGPASSWORD, PGDATABASE   the database; libpq reads these itself
    TASKBOARD_SECRET_KEY                             signs the cookie; every worker needs the same one
    TASKBOARD_HOST, TASKBOARD_PORT                   where `python3 taskboard.py` listens (127.0.0.1:8080)
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
from datetime import datetime, timezone
from typing import Any

import psycopg2
import psycopg2.extras
from flask import Blueprint, Flask, abort, flash, g, redirect, render_template, request, session, url_for
from werkzeug.exceptions import HTTPException
from werkzeug.security import check_password_hash
from werkzeug.serving import make_server
from werkzeug.wrappers import Response

SESSION_LIFETIME = "14 days"
TITLE_LENGTH = 200
ACTIVITY_SHOWN = 8

# The hash of a password that was thrown away. An unknown address is checked against it, so that it takes
# as long as a wrong password and nobody learns which addresses have an account.
NOBODYS_PASSWORD_HASH = (
    "pbkdf2:sha256:260000$eWzv2LAgHdRxfRfT$33cbe75fa9efd6f72aa4a4e1efc70507825331aeb0a3cc95b4da42dbc438fd3e"
)

pages = Blueprint("pages", __name__)


# ---------------------------------------------------------------------------
# database
# ---------------------------------------------------------------------------


def database() -> Any:
    """The request's connection. `with database():` is one transaction: commit at the end, or roll back."""
    if "connection" not in g:
        g.connection = psycopg2.connect(
            application_name="taskboard",
            connect_timeout=5,
            cursor_factory=psycopg2.extras.RealDictCursor,
        )
    return g.connection


def query(sql: str, **parameters: Any) -> list[dict[str, Any]]:
    """Run one statement and return its rows; none for a statement without a result."""
    with database().cursor() as cursor:
        cursor.execute(sql, parameters)
        return list(cursor.fetchall()) if cursor.description else []


def record(user_id: int | None, action: str, subject: str = "") -> None:
    """Add a line to the activity log, in the transaction of what it reports."""
    query(
        "INSERT INTO activity (user_id, action, subject) VALUES (%(user_id)s, %(action)s, %(subject)s)",
        user_id=user_id,
        action=action,
        subject=subject,
    )


@pages.teardown_app_request
def close_database(_error: BaseException | None) -> None:
    connection = g.pop("connection", None)
    if connection is not None:
        connection.close()


# ---------------------------------------------------------------------------
# sessions and forms
# ---------------------------------------------------------------------------


def token_hash(token: str) -> str:
    """What the database keeps of a session's token: somebody who reads the table cannot use it."""
    return hashlib.sha256(token.encode()).hexdigest()


def form_text(name: str) -> str:
    """A field of the form on one line, without the NUL that PostgreSQL cannot store."""
    return " ".join(request.form.get(name, "").replace("\0", "").split())


def csrf_token() -> str:
    """The token that every form of this browser carries."""
    return str(session.setdefault("csrf_token", secrets.token_urlsafe(24)))


@pages.before_app_request
def load_user() -> None:
    g.user = None
    token = session.get("token")
    if token is None or request.endpoint in ("static", "pages.health"):
        return
    with database():
        users = query(
            "UPDATE sessions SET last_seen_at = now() FROM users"
            " WHERE sessions.token_hash = %(token_hash)s AND users.id = sessions.user_id"
            " AND sessions.created_at > now() - %(lifetime)s::interval"
            " RETURNING users.id, users.email, users.name, users.login_count, users.last_login_at",
            token_hash=token_hash(token),
            lifetime=SESSION_LIFETIME,
        )
    g.user = users[0] if users else None


@pages.before_app_request
def check_form() -> None:
    if request.method == "POST":
        sent = request.form.get("csrf_token", "")
        if not hmac.compare_digest(sent.encode(), csrf_token().encode()):
            abort(400, "This form has expired. Go back, reload the page and try again.")


@pages.before_app_request
def require_login() -> Response | None:
    public = (None, "static", "pages.health", "pages.login_form", "pages.login")
    if g.user is None and request.endpoint not in public:
        return redirect(url_for("pages.login_form"))
    return None


@pages.after_app_request
def set_headers(response: Response) -> Response:
    response.headers["X-Content-Type-Options"] = "nosniff"
    if request.endpoint != "static":
        response.headers["Cache-Control"] = "no-store"
    return response


# ---------------------------------------------------------------------------
# log in and out
# ---------------------------------------------------------------------------


@pages.get("/login")
def login_form() -> Any:
    return redirect(url_for("pages.board")) if g.user else render_template("login.html", email="")


@pages.post("/login")
def login() -> Any:
    email = form_text("email")
    users = query("SELECT id, password_hash FROM users WHERE lower(email) = lower(%(email)s)", email=email)
    known_hash = users[0]["password_hash"] if users else NOBODYS_PASSWORD_HASH
    if not check_password_hash(known_hash, request.form.get("password", "")):
        with database():
            record(None, "failed to log in as", email[:TITLE_LENGTH])
        return render_template("login.html", email=email, error="Wrong email or password."), 403
    start_session(users[0]["id"])
    return redirect(url_for("pages.board"))


def start_session(user_id: int) -> None:
    """Log a user in: a new token in the browser, and the traces in the database that applications leave."""
    session.clear()
    session["token"] = secrets.token_urlsafe(32)
    with database():
        query(
            "INSERT INTO sessions (token_hash, user_id, user_agent)"
            " VALUES (%(token_hash)s, %(user_id)s, %(user_agent)s)",
            token_hash=token_hash(session["token"]),
            user_id=user_id,
            user_agent=request.user_agent.string[:TITLE_LENGTH],
        )
        query(
            "UPDATE users SET login_count = login_count + 1, last_login_at = now() WHERE id = %(user_id)s",
            user_id=user_id,
        )
        record(user_id, "logged in")


@pages.post("/logout")
def logout() -> Response:
    with database():
        query(
            "DELETE FROM sessions WHERE token_hash = %(token_hash)s", token_hash=token_hash(session["token"])
        )
        record(g.user["id"], "logged out")
    session.clear()
    flash("You are logged out.")
    return redirect(url_for("pages.login_form"))


# ---------------------------------------------------------------------------
# the board
# ---------------------------------------------------------------------------


@pages.get("/")
def home() -> Response:
    return redirect(url_for("pages.board"))


@pages.get("/board")
def board() -> str:
    return render_board()


def render_board(error: str = "", failed_project: int | None = None, title: str = "") -> str:
    """The board; with an error, the form of that project keeps what was typed."""
    projects = query("SELECT id, name, description FROM projects ORDER BY id")
    tasks: dict[int, list[dict[str, Any]]] = {project["id"]: [] for project in projects}
    for task in query("SELECT id, project_id, title, done_at FROM tasks ORDER BY done_at IS NOT NULL, id"):
        # A project created between the two queries is left for the next page view.
        if task["project_id"] in tasks:
            tasks[task["project_id"]].append(task)
    activity = query(
        "SELECT activity.action, activity.subject, activity.created_at, users.name FROM activity"
        " LEFT JOIN users ON users.id = activity.user_id ORDER BY activity.id DESC LIMIT %(limit)s",
        limit=ACTIVITY_SHOWN,
    )
    return render_template(
        "board.html",
        projects=projects,
        tasks=tasks,
        activity=activity,
        error=error,
        failed_project=failed_project,
        typed_title=title,
    )


@pages.post("/projects/<int:project_id>/tasks")
def add_task(project_id: int) -> Any:
    if not query("SELECT id FROM projects WHERE id = %(id)s", id=project_id):
        abort(404, "This project does not exist.")
    title = form_text("title")
    if not 0 < len(title) <= TITLE_LENGTH:
        problem = "A task needs a title." if not title else f"A title has {TITLE_LENGTH} characters at most."
        return render_board(problem, project_id, title), 422
    with database():
        query(
            "INSERT INTO tasks (project_id, title, created_by)"
            " VALUES (%(project_id)s, %(title)s, %(user_id)s)",
            project_id=project_id,
            title=title,
            user_id=g.user["id"],
        )
        record(g.user["id"], "added", title)
    flash(f"Added “{title}”.")
    return redirect(url_for("pages.board", _anchor=f"project-{project_id}"))


@pages.post("/tasks/<int:task_id>/done")
def mark_done(task_id: int) -> Response:
    return change_task(
        task_id,
        "UPDATE tasks SET done_at = coalesce(done_at, now()) WHERE id = %(id)s RETURNING project_id, title",
        "finished",
    )


@pages.post("/tasks/<int:task_id>/reopen")
def reopen(task_id: int) -> Response:
    return change_task(
        task_id, "UPDATE tasks SET done_at = NULL WHERE id = %(id)s RETURNING project_id, title", "reopened"
    )


@pages.post("/tasks/<int:task_id>/delete")
def delete_task(task_id: int) -> Response:
    return change_task(task_id, "DELETE FROM tasks WHERE id = %(id)s RETURNING project_id, title", "deleted")


def change_task(task_id: int, sql: str, action: str) -> Response:
    """Run `sql` on one task, log it, and go back to the task's project."""
    with database():
        changed = query(sql, id=task_id)
        if not changed:
            abort(404, "This task does not exist any more.")
        record(g.user["id"], action, changed[0]["title"])
    flash(f"{action.capitalize()} “{changed[0]['title']}”.")
    return redirect(url_for("pages.board", _anchor=f"project-{changed[0]['project_id']}"))


# ---------------------------------------------------------------------------
# health, errors, start
# ---------------------------------------------------------------------------


@pages.get("/health")
def health() -> Any:
    query("SELECT 1 FROM users LIMIT 1")
    return {"status": "ok"}


@pages.app_errorhandler(HTTPException)
def show_http_error(error: HTTPException) -> Any:
    if error.response is not None or error.code is None or error.code < 400:
        return error
    return render_template("error.html", title=error.name, message=error.description), error.code


@pages.app_errorhandler(psycopg2.OperationalError)
def show_database_error(error: psycopg2.OperationalError) -> Any:
    if request.endpoint == "pages.health":
        return {"status": "unavailable", "reason": str(error).strip()}, 503
    message = "The database does not answer. Wait a moment and try again."
    return render_template("error.html", title="Service Unavailable", message=message), 503


def format_time(moment: datetime) -> str:
    return f"{moment.astimezone(timezone.utc):%Y-%m-%d %H:%M} UTC"


def create_app() -> Flask:
    """The WSGI application, as in `gunicorn 'taskboard:create_app()'`."""
    app = Flask(__name__)
    app.secret_key = os.environ.get("TASKBOARD_SECRET_KEY")
    if not app.secret_key:
        raise SystemExit("TASKBOARD_SECRET_KEY is not set. Set it to a long random text.")
    app.config["SESSION_COOKIE_NAME"] = "taskboard"
    app.config["SESSION_COOKIE_SAMESITE"] = "Lax"
    app.config["MAX_CONTENT_LENGTH"] = 64 * 1024
    app.jinja_env.globals.update(csrf_token=csrf_token, title_length=TITLE_LENGTH)
    app.jinja_env.filters["time"] = format_time
    app.register_blueprint(pages)
    return app


def main() -> None:
    """Serve with the development server; port 0 takes a free one, and the first line says which."""
    host = os.environ.get("TASKBOARD_HOST", "127.0.0.1")
    server = make_server(host, int(os.environ.get("TASKBOARD_PORT", "8080")), create_app(), threaded=True)
    print(f"Taskboard listens on http://{host}:{server.server_port}", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
