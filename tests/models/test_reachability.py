"""The hub and the libraries: what is unreachable, missing or broken is reported quickly and in one line."""

import http.server
import socket
import threading
import time
from typing import Any

import pytest
import torch

from tests.helpers.tiny import refusal
from vitscope.errors import ModelUnavailableError
from vitscope.models.checkpoints import hub


@pytest.mark.parametrize("name", ["google/vit-base-patch16-224", "resnet-something"])
@pytest.mark.parametrize("offline", [True, False], ids=["offline mode", "hub unreachable"])
def test_an_unreachable_hub_is_reported_quickly(monkeypatch: pytest.MonkeyPatch, name: str, offline: bool) -> None:
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    message = refusal(ModelUnavailableError, name)
    assert time.monotonic() - start < 5
    assert message.startswith(f"{name} is not in the local cache")
    assert "vit-nano" in message
    assert "local folder" in message


def test_timm_contacts_an_unreachable_hub_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In offline mode timm's hub client does not retry for most of a minute."""
    timm = pytest.importorskip("timm")
    offline = []

    def create(*_: Any, **__: Any) -> None:
        offline.append(hub.constants.HF_HUB_OFFLINE)
        raise OSError("nothing came\nand nothing will")

    monkeypatch.setattr(timm, "create_model", create)
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    for reach in (False, True):
        monkeypatch.setattr("vitscope.models.backends.timm.backend.is_hub_reachable", lambda reach=reach: reach)
        message = refusal(ModelUnavailableError, "timm:test_vit")
        assert "vit-nano" in message
        assert "local folder" in message
    assert offline == [True, False]
    assert hub.constants.HF_HUB_OFFLINE is False


@pytest.mark.slow
@pytest.mark.parametrize("reach", [True, False], ids=["interrupted", "no response"])
def test_torchvision_without_a_network_suggests_alternatives(monkeypatch: pytest.MonkeyPatch, reach: bool) -> None:
    torchvision = pytest.importorskip("torchvision")

    def fetch(*_: Any, **__: Any) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", fetch)
    monkeypatch.setattr("vitscope.models.backends.torchvision.backend.host_responds", lambda _: reach)
    message = refusal(ModelUnavailableError, "torchvision:resnet18")
    assert "vit-nano" in message
    assert "local folder" in message


def test_a_missing_or_broken_library_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(raised: Exception) -> Any:
        def import_module(_: str) -> None:
            raise raised

        return import_module

    module = "vitscope.models.backends.libraries.importlib.import_module"
    with monkeypatch.context() as patch:
        patch.setattr(module, fail(ModuleNotFoundError("no module", name="timm")))
        message = refusal(ModelUnavailableError, "timm:test_vit")
        assert message == "timm is not installed: pip install 'vitscope[timm]'"
    with monkeypatch.context() as patch:
        patch.setattr(module, fail(ModuleNotFoundError("no module", name="yaml")))
        assert refusal(ModelUnavailableError, "timm:test_vit") == "timm needs yaml: pip install yaml"
    with monkeypatch.context() as patch:
        patch.setattr(module, fail(RuntimeError("operator nms\ndoes not exist")))
        message = refusal(ModelUnavailableError, "timm:test_vit")
        assert f"torch {torch.__version__}" in message
        assert "operator nms" in message


class _NotFound(http.server.BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_error(404)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that sets the port of the hub."""
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "TIMEOUT_SECONDS", 0.3)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setenv("no_proxy", "*")
    return lambda port: monkeypatch.setattr(hub.constants, "ENDPOINT", f"http://127.0.0.1:{port}")


def test_a_hub_with_any_response_is_reachable(endpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), _NotFound) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint(server.server_port)
        assert hub.is_hub_reachable()
        monkeypatch.setenv("TRANSFORMERS_OFFLINE", "1")
        assert not hub.is_hub_reachable()
        server.shutdown()


@pytest.mark.slow
def test_a_silent_or_missing_hub_is_not_reachable(endpoint: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint(silent.getsockname()[1])
        assert not hub.is_hub_reachable()
        port = silent.getsockname()[1]
    endpoint(port)
    assert not hub.is_hub_reachable()
