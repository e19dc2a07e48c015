"""Spaces, accounts and tokens of the tests' own Hub, against the stock client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from hub import HubServer, serve
from hub.accounts import READ, WRITE, scope
from hub.spaces import add_log, control, secret_values
from test_hub_server import client

pytestmark = pytest.mark.hub
SPACE = """
def make(name="lab/study", visibility="protected", sdk="gradio", **more):
    api.create_repo(name, repo_type="space", space_sdk=sdk, visibility=visibility, **more)
    readme = b"---\\ntitle: Study\\nsdk: gradio\\napp_file: app.py\\n---\\n"
    add = [CommitOperationAdd(path_in_repo=path, path_or_fileobj=text) for path, text in
           (("README.md", readme), ("app.py", b"print(1)"))]
    api.create_commit(name, add, commit_message="Add the page", repo_type="space")
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with serve(tmp_path / "hub", "lab/grades") as server:
        yield server


def test_whoami_tells_users_organizations_and_what_a_token_may_do(hub: HubServer, tmp_path: Path):
    hub.store.accounts.add_organization("clinic", {"lab": "admin", "guest": "read"})
    scopes = [scope("dataset", "lab/grades", READ, WRITE)]
    hub.store.accounts.add_token("hf_fine", "lab", "fineGrained", scopes)
    hub.store.accounts.add_token("hf_guest", "guest", "write")
    printed = client(
        hub,
        tmp_path,
        """
        import json
        print(json.dumps([api.whoami(token) for token in (api.token or get_token(), "hf_fine")]))
        try:
            api.whoami("hf_none")
        except HfHubHTTPError as error:
            assert error.response.status_code == 401 and "Invalid user token" in str(error)
        api.create_repo("clinic/model")
        try:
            HfApi(token="hf_guest").create_repo("clinic/second")
            raise SystemExit("a reader made a repo")
        except HfHubHTTPError as error:
            assert error.response.status_code == 403
        """,
    )
    own, fine = json.loads(printed)
    assert (own["name"], own["isPro"], own["auth"]["accessToken"]["role"]) == ("lab", True, "write")
    assert [(org["name"], org["roleInOrg"]) for org in own["orgs"]] == [("clinic", "admin")]
    assert fine["auth"]["accessToken"]["fineGrained"]["scoped"] == scopes


def test_a_fine_grained_token_reaches_what_its_scopes_name(hub: HubServer, tmp_path: Path):
    for kind, name in (("datasets", "lab/other"), ("models", "lab/grades")):
        hub.store.create(kind, name, private=True)
    hub.store.accounts.add_token("hf_one", "lab", "fineGrained", [scope("dataset", "lab/grades", READ, WRITE)])
    hub.store.accounts.add_token("hf_look", "lab", "fineGrained", [scope("user", "lab", READ)])
    hub.store.accounts.add_token("hf_theirs", "visitor", "fineGrained", [scope("dataset", "lab/grades", WRITE)])
    code = """
    def may(write, name, kind):
        try:
            api.auth_check(name, repo_type=kind, write=write)
            return 1
        except HfHubHTTPError:
            return 0
    repos = (("lab/grades", "dataset"), ("lab/other", "dataset"), ("lab/grades", "model"))
    print([may(write, *repo) for write in (False, True) for repo in repos])
    """
    assert client(hub, tmp_path, code, token="hf_one") == "[1, 0, 0, 1, 0, 0]"
    assert client(hub, tmp_path, code, token="hf_look") == "[1, 1, 1, 0, 0, 0]"
    assert client(hub, tmp_path, code, token="hf_theirs") == "[0, 0, 0, 0, 0, 0]"


def test_a_space_builds_runs_pauses_and_restarts(hub: HubServer, tmp_path: Path):
    code = SPACE + (
        """
api.create_repo("lab/empty", repo_type="space", space_sdk="gradio")
assert api.get_space_runtime("lab/empty").stage == "NO_APP_FILE"
make(space_hardware="cpu-upgrade", space_sleep_time=600)
stages = [api.get_space_runtime("lab/study").stage, api.wait_for_space("lab/study", poll_interval=0.05).stage]
runtime = api.get_space_runtime("lab/study")
assert (runtime.hardware, runtime.sleep_time) == ("cpu-upgrade", 600)
stages += [api.pause_space("lab/study").stage, api.get_space_runtime("lab/study").stage]
stages += [api.restart_space("lab/study").stage, api.wait_for_space("lab/study", poll_interval=0.05).stage]
assert api.request_space_hardware("lab/study", "t4-small").requested_hardware == "t4-small"
assert api.set_space_sleep_time("lab/study", 300).sleep_time == 300
info = api.space_info("lab/study")
assert (info.sdk, info.private, info.visibility) == ("gradio", True, "protected") and info.host
hardware = {machine.name: machine.unit_cost_usd for machine in api.list_spaces_hardware()}
assert hardware["cpu-basic"] == 0 and hardware["cpu-upgrade"] > 0
print(stages, api.wait_for_space("lab/study", poll_interval=0.05).stage, info.host)
"""
    )
    *stages, host = client(hub, tmp_path, code).split()
    assert "".join(stages) == "['BUILDING','RUNNING','PAUSED','PAUSED','BUILDING','RUNNING']RUNNING"
    assert "RUNNING" in urlopen(host).read().decode()
    control(hub.store, "lab/study", outcome="RUNTIME_ERROR", error="no token")
    code = "runtime = api.get_space_runtime('lab/study'); print(runtime.stage, runtime.raw['errorMessage'])"
    assert client(hub, tmp_path, code) == "RUNTIME_ERROR no token"
    with pytest.raises(HTTPError, match="503"):
        urlopen(host)


def test_the_page_of_a_protected_space_is_there_for_all_and_its_files_are_not(hub: HubServer, tmp_path: Path):
    hub.store.add_token("hf_visitor", "visitor")
    code = SPACE + (
        """
make()
make("lab/hidden", visibility="private")
for name in ("lab/study", "lab/hidden"):
    api.wait_for_space(name, poll_interval=0.05)
    assert not HfApi(token="hf_visitor").repo_exists(name, repo_type="space")
"""
    )
    client(hub, tmp_path, code)
    assert urlopen(f"{hub.endpoint}/-/running/lab/study/").status == 200
    with pytest.raises(HTTPError, match="404"):
        urlopen(f"{hub.endpoint}/-/running/lab/hidden/")


def test_secrets_are_written_and_never_told_variables_are(hub: HubServer, tmp_path: Path):
    hub.store.add_token("hf_visitor", "visitor")
    code = SPACE + (
        """
make(visibility="public", space_variables=[{"key": "A", "value": "1"}])
api.add_space_secret("lab/study", "HF_TOKEN", "hf_very_secret", description="writes lab/grades")
api.add_space_secret("lab/study", "OTHER", "x")
api.delete_space_secret("lab/study", "OTHER")
api.add_space_variable("lab/study", "B", "2")
variables = api.delete_space_variable("lab/study", "A")
assert {key: found.value for key, found in variables.items()} == {"B": "2"}
(secret,) = api.get_space_secrets("lab/study").values()
assert (secret.key, secret.description, secret.updated_at is None) == ("HF_TOKEN", "writes lab/grades", False)
try:
    HfApi(token="hf_visitor").get_space_secrets("lab/study")
    raise SystemExit("told a visitor")
except HfHubHTTPError as error:
    assert error.response.status_code == 403
print(api.get_space_variables("lab/study"), secret)
"""
    )
    assert "hf_very_secret" not in client(hub, tmp_path, code)
    assert secret_values(hub.store, "lab/study") == {"HF_TOKEN": "hf_very_secret"}


def test_logs_come_as_they_are_written(hub: HubServer, tmp_path: Path):
    client(hub, tmp_path, SPACE + "make()")
    for line in ("loading the study", "serving"):
        add_log(hub.store, "lab/study", line)
    add_log(hub.store, "lab/study", "Collecting gradio", "build")
    code = """
    for build, follow in ((False, False), (True, False), (False, True)):
        lines = list(api.fetch_space_logs("lab/study", build=build, follow=follow))
        print([line.strip() for line in lines if not line.startswith("=====")], len(lines))
    """
    run = "['loading the study', 'serving'] 3"
    assert client(hub, tmp_path, code).splitlines() == [run, "['Collecting gradio'] 2", run]


def test_spaces_that_nobody_pays_for_are_402(hub: HubServer, tmp_path: Path):
    hub.store.accounts.add_user("free", pro=False, pays=False)
    hub.store.accounts.add_organization("poor", {"free": "admin"}, plan=None)
    hub.store.add_token("hf_free", "free")
    code = SPACE + (
        """
make("free/page", visibility="public", sdk="static")
statuses = []
for name in ("free/study", "poor/study"):
    for hardware in (None, "t4-small"):
        try:
            make(name, space_hardware=hardware, exist_ok=True)
        except HfHubHTTPError as error:
            statuses.append(error.response.status_code)
print(statuses)
"""
    )
    assert client(hub, tmp_path, code, token="hf_free") == "[402, 402, 402, 402]"


def test_volumes_mount_buckets_that_exist(hub: HubServer, tmp_path: Path):
    code = SPACE + (
        """
make()
volume = lambda name: [Volume(type="bucket", source=name, mount_path="/data")]
try:
    api.set_space_volumes("lab/study", volume("lab/none"))
    raise SystemExit("mounted nothing")
except BadRequestError:
    pass
url = api.create_bucket("lab/state", private=True)
assert api.create_bucket("lab/state", exist_ok=True) == url and api.bucket_info("lab/state").private
api.set_space_volumes("lab/study", volume("lab/state"))
(mounted,) = api.get_space_runtime("lab/study").volumes
assert (mounted.source, mounted.mount_path) == ("lab/state", "/data")
api.delete_space_volumes("lab/study")
assert api.get_space_runtime("lab/study").volumes == []
"""
    )
    client(hub, tmp_path, code)


def test_a_hub_that_is_a_process_is_told_over_http_what_becomes_of_a_space(hub: HubServer, tmp_path: Path):
    client(hub, tmp_path, SPACE + "make()")
    body = json.dumps({"outcome": "BUILD_ERROR", "build_s": 0, "build_log": ["No such package"]}).encode()
    urlopen(Request(f"{hub.endpoint}/-/spaces/lab/study", data=body, method="POST"))
    code = "print(api.get_space_runtime('lab/study').stage, *api.fetch_space_logs('lab/study', build=True))"
    printed = client(hub, tmp_path, code)
    assert printed.startswith("BUILD_ERROR") and "No such package" in printed
