"""People and their rights on the tracking server, from the command line.

    python services/users.py add NAME              a new user
    python services/users.py password NAME         a new password, also one's own
    python services/users.py grant NAME WHAT LEVEL rights to an experiment, by its name, or to a model, as models:/NAME
    python services/users.py list                  everyone, with their rights
    python services/users.py remove NAME

The server is MLFLOW_TRACKING_URI; who asks is MLFLOW_TRACKING_USERNAME with MLFLOW_TRACKING_PASSWORD, an administrator
or, for `password`, the user. Where none of these is set, it is the server of services/.env and its administrator. New
passwords are asked for, or read as the first line of standard input; they are never arguments.

Standard library only: this runs on hosts that have nothing but Python.
"""

from __future__ import annotations

import argparse
import base64
import getpass
import json
import os
import ssl
import sys
import urllib.error
import urllib.parse
import urllib.request
from typing import Any

import settings
from settings import Refused

VARIABLES = ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
TIMEOUT_S = 20
LEVELS = ("READ", "EDIT", "MANAGE", "DENY")


class Server:
    """The tracking server's interface for users and rights."""

    def __init__(self, uri: str, username: str, password: str):
        self.uri, self.username, self.password = uri.rstrip("/"), username, password

    @classmethod
    def chosen(cls) -> Server:
        """The server that the variables of MLflow's own clients name, else the one that services/.env describes."""
        values = {name: os.environ.get(name, "") for name in VARIABLES}
        if not any(values.values()) and settings.FILE.exists():
            here = settings.load()
            if here["TLS"] != "off":  # next to the proxy, the server itself talks to this machine alone
                here["BIND"] = "127.0.0.1"
            return cls(settings.address(here), here["ADMIN_USERNAME"], here["ADMIN_PASSWORD"])
        if absent := [name for name, value in values.items() if not value]:
            raise Refused(
                f"{', '.join(absent)} not set; needed: the server's address, an administrator's name and password"
            )
        uri, username, password = values.values()
        if not uri.startswith(("http://", "https://")):
            raise Refused(f"MLFLOW_TRACKING_URI is '{uri}'; only a server has users: give its http(s):// address")
        return cls(uri, username, password)

    def ask(self, method: str, path: str, **values: str) -> Any:
        """Send a request (`values` in its address for GET, else as JSON) and return the answer's JSON."""
        address = f"{self.uri}/api/{path}" + ("?" + urllib.parse.urlencode(values) if method == "GET" else "")
        request = urllib.request.Request(address, method=method, headers={"Content-Type": "application/json"})
        request.data = None if method == "GET" else json.dumps(values).encode()
        credentials = base64.b64encode(f"{self.username}:{self.password}".encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {credentials}")  # never to another server
        context = ssl.create_default_context(cafile=os.environ.get("MLFLOW_TRACKING_SERVER_CERT_PATH"))
        try:
            with urllib.request.urlopen(request, timeout=TIMEOUT_S, context=context) as response:
                return json.loads(response.read() or b"{}")
        except urllib.error.HTTPError as error:
            raise self._refusal(error.code, error.read()) from None
        except OSError as error:
            why = getattr(error, "reason", error)
            raise Refused(f"cannot reach {self.uri} ({why}); is it up and MLFLOW_TRACKING_URI right?", 1) from None
        except ValueError:
            raise Refused(f"{self.uri} is no MLflow server; set MLFLOW_TRACKING_URI to its address") from None

    def _refusal(self, status: int, body: bytes) -> Refused:
        try:
            answer = json.loads(body)
            text, known = str(answer["message"]).partition(" Error: (")[0], answer["error_code"] != "ENDPOINT_NOT_FOUND"
        except (ValueError, KeyError, TypeError, IndexError):
            text, known = " ".join(body.decode(errors="replace").split())[:200], False
        if status == 401:
            return Refused(
                f"{self.uri} does not know '{self.username}' with this password; set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD to an administrator's"
            )
        if status == 403 and not known:
            return Refused(f"'{self.username}' may not do this ({text}); sign in as an administrator")
        if status == 404 and not known:
            return Refused(f"{self.uri} has no users; it is no MLflow server, or it runs without sign-in (AUTH=none)")
        return Refused(f"{self.uri} refused: {text}", 1 if status >= 500 else 2)


def new_password(name: str) -> str:
    """Ask twice on a terminal, else read a line of standard input."""
    if not sys.stdin.isatty():
        password = sys.stdin.readline().rstrip("\r\n")
    else:
        password = getpass.getpass(f"New password of {name} (12 characters or more): ")
        if getpass.getpass("The same again: ") != password:
            raise Refused("the two passwords differ; nothing was changed")
    if not password:
        raise Refused("no password given; type it, or give it as the first line of standard input")
    return password


def add(server: Server, name: str) -> None:
    server.ask("POST", "2.0/mlflow/users/create", username=name, password=new_password(name))
    print(f"{name} can sign in, read what all may read, and own what they make")


def password(server: Server, name: str) -> None:
    values = {"username": name, "password": new_password(name)}
    if name == server.username:
        values["current_password"] = server.password
    server.ask("PATCH", "2.0/mlflow/users/update-password", **values)
    print(f"{name} has a new password; the old one no longer works")


def grant(server: Server, name: str, what: str, level: str) -> None:
    """Give a right in place of the one that the user had there."""
    kind, resource = resource_of(server, what)
    right = {"username": name, "resource_type": kind, "resource_id": resource}
    path = "3.0/mlflow/users/permissions"
    if any(held[:2] == (kind, resource) for held in rights(server, name)):
        server.ask("POST", f"{path}/revoke", **right)
    server.ask("POST", f"{path}/grant", **right, permission=level)
    print(f"{name} has {level} on {what}")


def resource_of(server: Server, what: str) -> tuple[str, str]:
    """MLflow's kind and id of what a person names; one that does not exist is refused."""
    model = what.removeprefix("models:/")
    if model != what:
        server.ask("GET", "2.0/mlflow/registered-models/get", name=model)
        return "registered_model", model
    answer = server.ask("GET", "2.0/mlflow/experiments/get-by-name", experiment_name=what)
    return "experiment", answer["experiment"]["experiment_id"]


def rights(server: Server, name: str) -> list[tuple[str, str, str]]:
    """Kind, id and level of every right that was granted to a user."""
    held = server.ask("GET", "3.0/mlflow/users/permissions/list", username=name)["permissions"]
    return [(right["resource_type"], right["resource_pattern"], right["permission"]) for right in held]


def list_users(server: Server) -> None:
    for user in server.ask("GET", "2.0/mlflow/users/list")["users"]:
        held = [f"{level} {name_of(server, kind, key)}" for kind, key, level in rights(server, user["username"])]
        everything = ["administrator"] if user["is_admin"] else []
        print(f"{user['username']}: {', '.join(everything + held) or 'what all may read'}")


def name_of(server: Server, kind: str, key: str) -> str:
    if kind == "experiment" and key != "*":
        try:
            return str(server.ask("GET", "2.0/mlflow/experiments/get", experiment_id=key)["experiment"]["name"])
        except Refused:
            return f"experiment {key} (deleted for good)"
    return f"models:/{key}" if kind == "registered_model" else f"{kind} {key}"


def remove(server: Server, name: str) -> None:
    server.ask("DELETE", "2.0/mlflow/users/delete", username=name)
    print(f"{name} can no longer sign in; their runs stay")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for action in (add, password, remove):
        command = commands.add_parser(action.__name__)
        command.add_argument("name", metavar="NAME")
        command.set_defaults(action=action)
    commands.add_parser("list").set_defaults(action=list_users)
    command = commands.add_parser("grant")
    command.add_argument("name", metavar="NAME")
    command.add_argument("what", metavar="WHAT", help="an experiment's name, or models:/NAME")
    command.add_argument("level", choices=LEVELS)
    command.set_defaults(action=grant)
    given = vars(parser.parse_args())
    action, _ = given.pop("action"), given.pop("command")
    settings.run(lambda: action(Server.chosen(), **given))


if __name__ == "__main__":
    main()
