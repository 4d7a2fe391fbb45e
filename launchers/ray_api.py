"""What a Ray cluster's dashboard says over HTTP: the Jobs API and the list of nodes. Needs no ray, so submitting needs none."""

from __future__ import annotations

import json
import os
import stat
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from factory_train.errors import ConfigError, PolicyError, PreflightError, UnavailableError
from factory_train.launchers.ray_room import NodeRoom

_TIMEOUT_S = 20.0
_PORT = 8265
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
OPEN_WARNING = (
    "the Ray cluster at {address} takes jobs from anybody who reaches it: start it with RAY_AUTH_MODE=token and one token on all nodes "
    "(ray get-auth-token --generate)"
)


def dashboard_address(wanted: str | None, environ: Mapping[str, str] = os.environ) -> str:
    """Returns the base URL of the dashboard.

    Args:
        wanted: launcher.address; a GCS address (HOST:6379) stands for the dashboard of that host.

    Raises:
        ConfigError: no address is given anywhere.
    """
    text = wanted or environ.get("RAY_API_SERVER_ADDRESS") or environ.get("RAY_ADDRESS")
    if not text:
        raise ConfigError(
            "no Ray cluster is named",
            where="launcher.address",
            fix="launcher.address=http://HOST:8265, launcher.address=local, or RAY_ADDRESS",
        )
    if text.startswith(("http://", "https://")):
        return text.rstrip("/")
    if text == "auto":
        return f"http://127.0.0.1:{_PORT}"
    host = urlsplit(text if "://" in text else f"ray://{text}").hostname
    if not host:
        raise ConfigError(f"'{text}' is no address", where="launcher.address", fix="launcher.address=http://HOST:8265")
    return f"http://{f'[{host}]' if ':' in host else host}:{_PORT}"


def find_token(environ: Mapping[str, str] = os.environ) -> str | None:
    """Returns the token, from where Ray itself looks for it; None when there is none.

    Raises:
        PolicyError: the file of the token can be read by others.
    """
    if token := environ.get("RAY_AUTH_TOKEN"):
        return token.strip()
    path = Path(environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")
    return read_token(path)


def read_token(path: Path) -> str | None:
    """Returns the token in a file; None when there is no such file.

    Raises:
        PolicyError: others can read it.
    """
    try:
        mode, text = path.stat().st_mode, path.read_text()
    except OSError:
        return None
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise PolicyError("others can read the token of the Ray cluster", where=str(path), fix=f"chmod 600 {path}, and a new token")
    return text.strip() or None


@dataclass(frozen=True)
class RayApi:
    """A dashboard that answered.

    Args:
        address: its base URL.
        token: what it wants to see; None where it takes jobs from anybody.
        ray_version: of the cluster.
    """

    address: str
    token: str | None
    ray_version: str

    @staticmethod
    def connect(address: str, token_path: str | None = None) -> RayApi:
        """Returns the cluster at `address`. A token is sent only to one that asks for it.

        Args:
            token_path: file of the token, where it is known; else Ray's own places.

        Raises:
            UnavailableError: nothing answers there.
            PolicyError: it wants a token, and there is none or another one.
        """
        status, said = _request(address, "/api/version", None)
        token = None
        if status == 401:
            token = read_token(Path(token_path)) if token_path else find_token()
            if token is None:
                raise PolicyError(
                    "the Ray cluster wants a token, and there is none here",
                    where=address,
                    fix="copy the cluster's token (on its head: ray get-auth-token) to ~/.ray/auth_token, mode 0600, or set RAY_AUTH_TOKEN",
                )
            status, said = _request(address, "/api/version", token)
        if status == 403:
            raise PolicyError(
                "the Ray cluster does not accept this token",
                where=address,
                fix="RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token must hold the token its nodes were started with",
            )
        if status != 200 or not isinstance(said, dict) or "ray_version" not in said:
            raise UnavailableError(
                f"what answers there is no Ray dashboard (HTTP {status})", where=address, fix="launcher.address=http://HOST:8265"
            )
        return RayApi(address, token, str(said["ray_version"]))

    def check_version(self) -> None:
        """Checks that the Python that submits could join the cluster, for its nodes will run the very same.

        Raises:
            PreflightError: it has another Ray.
        """
        try:
            mine = metadata.version("ray")
        except metadata.PackageNotFoundError:
            mine = "none"
        if mine != self.ray_version:
            raise PreflightError(
                f"the cluster runs Ray {self.ray_version}, and this Python has {mine}",
                where=self.address,
                fix=f"pip install 'ray[default]=={self.ray_version}', or launcher.python=PYTHON on the nodes that has it",
            )

    def submit(self, submission_id: str, entrypoint: str, env_vars: Mapping[str, str], metadata: Mapping[str, str]) -> None:
        """Starts a job.

        Raises:
            UnavailableError: the cluster takes none.
        """
        body = {
            "submission_id": submission_id,
            "entrypoint": entrypoint,
            "runtime_env": {"env_vars": dict(env_vars)},
            "metadata": dict(metadata),
        }
        status, said = _request(self.address, "/api/jobs/", self.token, body)
        if status != 200:
            raise UnavailableError(f"Ray did not take the job: {_last_line(said)}", where=self.address, fix="doctor shows the cluster")

    def job(self, submission_id: str) -> dict[str, Any] | None:
        """Returns what the cluster knows about a job; None when it does not know it.

        Raises:
            UnavailableError: it does not answer.
        """
        status, said = _request(self.address, f"/api/jobs/{submission_id}", self.token)
        if status == 404:
            return None
        if status != 200 or not isinstance(said, dict):
            raise UnavailableError(f"Ray did not tell about the job: {_last_line(said)}", where=self.address)
        return said

    def jobs(self) -> list[dict[str, Any]]:
        """Returns all jobs of the cluster.

        Raises:
            UnavailableError: it does not answer.
        """
        status, said = _request(self.address, "/api/jobs/", self.token)
        if status != 200 or not isinstance(said, list):
            raise UnavailableError(f"Ray did not list its jobs: {_last_line(said)}", where=self.address)
        return said

    def stop(self, submission_id: str) -> None:
        """Ends a job: SIGTERM, and SIGKILL a few seconds later.

        Raises:
            UnavailableError: the cluster does not answer.
        """
        status, said = _request(self.address, f"/api/jobs/{submission_id}/stop", self.token, {})
        if status not in (200, 404):
            raise UnavailableError(f"Ray did not stop the job: {_last_line(said)}", where=self.address)

    def nodes(self) -> list[NodeRoom]:
        """Returns the nodes that are alive, with all they have.

        Raises:
            UnavailableError: the cluster does not answer.
        """
        status, said = _request(self.address, "/api/v0/nodes?limit=10000", self.token)
        try:
            rows = said["data"]["result"]["result"] if status == 200 and isinstance(said, dict) else None
        except (KeyError, TypeError):
            rows = None
        if rows is None:
            raise UnavailableError(f"Ray did not list its nodes: {_last_line(said)}", where=self.address)
        return [NodeRoom(row["node_name"], row["resources_total"]) for row in rows if row["state"] == "ALIVE"]


def _request(address: str, path: str, token: str | None, body: Mapping[str, Any] | None = None) -> tuple[int, Any]:
    """Returns the HTTP status and what was said, as JSON where it is."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address + path, data=data, headers=headers)
    # What a site sets for the way out must not lead a request to this machine astray.
    is_here = urlsplit(address).hostname in ("127.0.0.1", "localhost", "::1")
    opener = urllib.request.build_opener(*([urllib.request.ProxyHandler({})] if is_here else []))
    try:
        with opener.open(request, timeout=_TIMEOUT_S) as answer:
            status, text = answer.status, answer.read().decode(errors="replace")
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read().decode(errors="replace")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise UnavailableError(
            f"no Ray dashboard answers: {reason}",
            where=address,
            fix="is it up, and this its dashboard (port 8265)? launcher.address=http://HOST:PORT, launcher.address=local, or a tunnel",
        ) from None
    try:
        return status, json.loads(text)
    except ValueError:
        return status, text


def _last_line(said: Any) -> str:
    lines = str(said).strip().splitlines()
    return lines[-1][:300] if lines else "nothing said"
