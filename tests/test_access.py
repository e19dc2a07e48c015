"""Who may do what: one test for each sentence that the grading page promises about identity and safety."""

from __future__ import annotations

import base64
import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import itsdangerous
import pytest
from click.testing import CliRunner
from starlette.testclient import TestClient

from pathalign import phantom
from pathalign.cli import main
from pathalign.commands.serving import local_access, space_app
from pathalign.grading import gate
from pathalign.grading.access import Access, HubDoor, InviteDoor, Invites, SingleDoor, pseudonym_of
from pathalign.grading.service import GradingService
from pathalign.grading.study import Study
from pathalign.schema import InputError

SECRET = b"0123456789abcdef0123456789abcdef"
CALL = "/gradio_api/component_server/"
HOME = "http://127.0.0.1:7860"
CALLS = ("open_study", "next_items", "submit_rows", "saved_rows", "past_rows")


@pytest.fixture(scope="module")
def study_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("access")
    phantom.draw(4, 16, seed=1).save(folder / "candidates")
    phantom.draw(8, 16, seed=2).save(folder / "references")
    (folder / "study.yaml").write_text(
        "candidates: candidates\nreferences: references\nreferences_per_class: 2\n"
        "graders: [Ada, {name: Bea, pseudonym: reader-two}]\nowners: [Olga]\n"
    )
    return folder / "study.yaml"


@pytest.fixture(scope="module")
def service(study_file: Path) -> Iterator[GradingService]:
    made = space_app("grade").open_service(Study.load(study_file), study_file.parent / "state")
    yield made
    made.close()


@pytest.fixture
def invites(tmp_path: Path) -> Invites:
    return Invites(tmp_path / "invites.json")


@pytest.fixture(scope="module")
def site(service: GradingService, tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(service, Invites(tmp_path_factory.mktemp("invites") / "invites.json"))


class Site:
    """A server for invited people, and browsers that visit it."""

    def __init__(self, service: GradingService, invites: Invites) -> None:
        self.invites = invites
        self.tokens = {name: invites.create(name) for name in ("Ada", "Bea", "Olga", "Mallory")}
        door = InviteDoor(invites, SECRET)
        pseudonyms = {"Bea": "reader-two"}
        access = Access(door, SECRET, ("Ada", "Bea"), ("Olga",), None, pseudonyms)
        self.app = space_app("grade").create_app(service, access)

    def browser(self, name: str | None = None) -> TestClient:
        client = TestClient(self.app, base_url=HOME, headers={"origin": HOME})
        if name:
            assert client.post("/enter", json={"token": self.tokens[name]}).status_code == 200
        return client


def call(client: TestClient, function: str, payload: Any = None, **headers: str):
    body = {"data": payload or {}, "component_id": component_id(client), "fn_name": function, "session_hash": "x"}
    return client.post(CALL, json=body, headers=headers)


def component_id(client: TestClient) -> int:
    mounted = next(route.app for route in client.app.routes if hasattr(getattr(route, "app", None), "get_blocks"))
    return next(key for key, block in mounted.get_blocks().blocks.items() if block.get_block_name() == "html")


# Locally: one invite token for each grader.


def test_an_invitation_lets_one_person_in_and_only_its_hash_is_stored(site: Site):
    client = site.browser("Ada")
    assert client.get("/whoami").json() == {"grader": pseudonym_of("ada", SECRET), "owner": False}
    stored = site.invites.path.read_text()
    assert all(token not in stored for token in site.tokens.values())
    assert site.invites.path.stat().st_mode & 0o777 == 0o600


def test_the_cookie_of_an_invitation_cannot_be_read_by_scripts_or_sent_by_other_sites(site: Site):
    reply = TestClient(site.app, base_url=HOME).post("/enter", json={"token": site.tokens["Ada"]})
    cookie = reply.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    secure = TestClient(site.app, base_url=HOME).post(
        "/enter", json={"token": site.tokens["Ada"]}, headers={"x-forwarded-proto": "https"}
    )
    assert "; secure" in secure.headers["set-cookie"].lower()


@pytest.mark.parametrize("token", ["", "x", None, 5, {"a": 1}])
def test_a_token_that_nobody_was_given_opens_nothing(site: Site, token: Any):
    client = site.browser()
    assert client.post("/enter", json={"token": token}).status_code == 403
    assert client.get("/whoami").status_code == 401


def test_a_newer_invitation_ends_the_older_link_and_what_it_opened(service: GradingService, invites: Invites):
    site = Site(service, invites)
    client = site.browser("Ada")
    site.invites.create("Ada")
    assert client.get("/whoami").status_code == 401
    assert site.browser().post("/enter", json={"token": site.tokens["Ada"]}).status_code == 403


def test_a_cookie_that_was_changed_or_is_too_old_is_worth_nothing(invites: Invites):
    now = [1e9]
    door = InviteDoor(invites, SECRET, clock=lambda: now[0])
    value = door.enter(invites.create("Ada"))
    invites.create("Bea")
    assert door.claim({door.cookie_name: value}, {}).name == "Ada"
    forged = base64.urlsafe_b64encode(b"Bea").decode() + value[value.index(".") :]
    for bad in (forged, value[:-1], value + "0", "", "..", "é.1.2", value.replace(".1000000000.", ".1000000001.")):
        assert door.claim({door.cookie_name: bad}, {}) is None
    now[0] += 31 * 86400
    assert door.claim({door.cookie_name: value}, {}) is None


def test_multi_user_mode_refuses_to_start_without_invitations(study_file: Path, tmp_path: Path):
    with pytest.raises(InputError, match="pathalign grade invite"):
        local_access(Study.load(study_file), tmp_path)
    result = CliRunner().invoke(main, ["grade", "serve", str(study_file), "--state-dir", str(tmp_path)])
    assert result.exit_code == 1
    assert "Nobody is invited yet" in result.output


def test_a_single_user_may_grade_without_an_invitation_but_not_on_an_open_address(study_file: Path, tmp_path: Path):
    assert local_access(Study.load(study_file), tmp_path, single_user=True).visitor({}, {}).is_grader
    options = ["--single-user", "--host", "0.0.0.0", "--state-dir", str(tmp_path)]
    result = CliRunner().invoke(main, ["grade", "serve", str(study_file), *options])
    assert result.exit_code == 1
    assert "anybody at 0.0.0.0 could grade" in result.output


@pytest.mark.parametrize(("owners", "said"), [("", True), ("owners: [Olga]\n", False)])
def test_serving_a_study_that_names_no_owner_says_that_nobody_may_see_the_results(
    study_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owners: str, said: bool
):
    study = tmp_path / "study.yaml"
    study.write_text(f"candidates: {study_file.parent / 'candidates'}\nreal_control_share: 0\n{owners}")
    Invites(tmp_path / "study.state" / "invites.json").create("Ada")
    monkeypatch.setattr("signal.signal", lambda *handler: None)
    monkeypatch.setattr("uvicorn.run", lambda *app, **options: None)
    result = CliRunner().invoke(main, ["grade", "serve", str(study)])
    assert result.exit_code == 0, result.output
    assert ("Nobody may see the results" in result.output) is said


def test_invite_prints_a_link_whose_token_no_server_log_can_hold(study_file: Path, tmp_path: Path):
    options = ["--state-dir", str(tmp_path), "--address", "http://grading.example/"]
    result = CliRunner().invoke(main, ["grade", "invite", str(study_file), "Ada", *options])
    address, _, token = result.output.strip().partition("#")
    assert address == "http://grading.example/enter"
    assert Invites(tmp_path / "invites.json").name_of(token) == "Ada"


def test_only_people_whom_the_study_lists_can_be_invited(study_file: Path, tmp_path: Path):
    result = CliRunner().invoke(main, ["grade", "invite", str(study_file), "Adda", "--state-dir", str(tmp_path)])
    assert result.exit_code == 1
    assert "Did you mean 'Ada'?" in result.output


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "x" * 101])
def test_names_that_cannot_be_shown_are_refused(invites: Invites, name: str):
    with pytest.raises(InputError, match="cannot be a grader's name"):
        invites.create(name)


# On a Space: Hugging Face OAuth with a list of allowed graders or an organization.


def hub_session(name: str, organizations: tuple[str, ...] = (), expires_at: float = 2e9) -> dict[str, Any]:
    orgs = [{"preferred_username": item} for item in organizations]
    return {"oauth_info": {"userinfo": {"preferred_username": name, "orgs": orgs}, "expires_at": expires_at}}


def test_on_a_space_listed_accounts_and_members_of_the_organization_may_grade():
    access = Access(HubDoor(lambda: 1e9), SECRET, ("Ada",), ("Olga",), "Lab")
    assert access.visitor({}, {}) is None
    assert access.visitor({}, hub_session("ada")).is_grader
    assert access.visitor({}, hub_session("zoe", ("lab",))).is_grader
    stranger = access.visitor({}, hub_session("zoe", ("other",)))
    assert not (stranger.is_grader or stranger.is_owner)
    assert access.visitor({}, hub_session("ada", expires_at=5e8)) is None


def test_a_space_refuses_to_start_without_a_list_or_an_organization():
    with pytest.raises(InputError, match="`graders` and no `organization`"):
        Access(HubDoor(), SECRET)


def test_a_space_believes_only_the_session_that_its_own_sign_in_has_signed(
    service: GradingService, monkeypatch: pytest.MonkeyPatch
):
    import hashlib

    import gradio.oauth

    access = Access(HubDoor(), SECRET, ("Ada",))
    with pytest.raises(InputError, match="Signing in works on a Space only"):
        space_app("grade").create_app(service, access)
    monkeypatch.setenv("SYSTEM", "spaces")
    monkeypatch.setenv("SPACE_ID", "lab/study")
    for name in ("CLIENT_ID", "CLIENT_SECRET", "SCOPES"):
        monkeypatch.setattr(gradio.oauth, f"OAUTH_{name}", "x")
    monkeypatch.setattr(gradio.oauth, "OPENID_PROVIDER_URL", "https://hub.invalid")
    app = space_app("grade").create_app(service, access, None, ("study.example",), "'self'")

    def who(key: str, name: str) -> int:
        content = base64.b64encode(json.dumps(hub_session(name, expires_at=9e9)).encode())
        cookie = itsdangerous.TimestampSigner(hashlib.sha256(key.encode()).hexdigest()).sign(content).decode()
        return TestClient(app, base_url="https://study.example", cookies={"session": cookie}).get("/whoami").status_code

    assert who("x-v4", "Ada") == 200
    assert who("guessed", "Ada") == 401
    assert who("x-v4", "Mallory") == 403
    assert "Sign in with Hugging Face" in TestClient(app).get("/", headers={"accept": "text/html"}).text


# Grader names become pseudonyms in anything published.


def test_a_pseudonym_tells_no_name_and_is_the_same_each_time_but_not_in_another_study():
    assert pseudonym_of("Ada", SECRET) == pseudonym_of("ada", SECRET)
    assert pseudonym_of("Ada", SECRET) != pseudonym_of("Ada", b"another secret of a study")
    assert pseudonym_of("Ada", SECRET) != pseudonym_of("Bea", SECRET)
    assert pseudonym_of("Ada", SECRET).startswith("grader-")


def test_names_of_all_who_are_known_are_taken_out_of_comments_in_exports(site: Site):
    client = site.browser("Ada")
    item = call(client, "next_items", {"mode": "single", "count": 1}).json()["items"][0]
    row = {"grade_id": "names", "item_id": item["item_id"], "mode": "single", "verdict": "unsure"}
    row["comment"] = "bea, Mallory and Olga think so, Adam does not"
    assert call(client, "submit_rows", {"rows": [row]}).json()["recorded"] == ["names"]
    archive = zipfile.ZipFile(io.BytesIO(site.browser("Olga").get("/results/export/jsonl").content))
    lines = archive.read("feedback/grades.jsonl").decode().splitlines()
    (kept,) = [line for line in map(json.loads, lines) if line["grade_id"] == "names"]
    assert kept["comment"] == "[name removed], [name removed] and [name removed] think so, Adam does not"


def test_what_a_browser_claims_about_its_grader_changes_nothing(site: Site, service: GradingService):
    client = site.browser("Bea")
    item = call(client, "next_items", {"mode": "single", "count": 1}).json()["items"][0]
    row = {"grade_id": "g1", "item_id": item["item_id"], "mode": "single", "verdict": "unsure", "grader": "reader-one"}
    assert call(client, "submit_rows", {"rows": [row]}).json()["refused"]
    row.pop("grader")
    assert call(client, "submit_rows", {"rows": [row]}).json()["recorded"] == ["g1"]
    (stored,) = [entry for entry in service.outbox.rows("grade") if entry["grade_id"] == "g1"]
    assert stored["grader"] == "reader-two"
    assert "Bea" not in json.dumps(stored)
    other = call(client, "submit_rows", {"rows": [{**row, "grade_id": "g2"}], "grader": "someone-else"}).json()
    assert other["error"] == "other"


# A foreign Origin gets 403 on every mutating call.


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:9999", "http://127.0.0.1.evil.example:7860"]
)
def test_a_foreign_origin_gets_403_on_every_mutating_call(site: Site, origin: str):
    client = site.browser("Ada")
    for function in CALLS:
        assert call(client, function, origin=origin).status_code == 403
    assert client.post("/enter", json={"token": site.tokens["Ada"]}, headers={"origin": origin}).status_code == 403
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        assert client.request(method, "/", headers={"origin": origin}).status_code == 403


def test_a_request_that_the_browser_marks_as_from_another_site_gets_403(site: Site):
    assert call(site.browser("Ada"), "open_study", **{"sec-fetch-site": "cross-site"}).status_code == 403


def test_a_name_that_another_site_points_at_this_machine_gets_403(site: Site):
    client = site.browser("Ada")
    assert client.get("/whoami", headers={"host": "evil.example:7860"}).status_code == 403


# An unlisted user gets 403.


def test_someone_who_is_invited_but_not_listed_gets_403_everywhere(site: Site):
    client = site.browser("Mallory")
    for path in ("/", "/whoami", "/results/", "/config"):
        assert client.get(path).status_code == 403
    assert call(client, "next_items", {"mode": "single", "count": 1}).status_code == 403


# Images need a session.


def test_a_stranger_gets_no_image_no_page_and_no_setting(site: Site):
    client = site.browser()
    for path in ("/", "/config", "/whoami", "/results/", "/assets/x.js", "/gradio_api/info", "/nowhere"):
        assert client.get(path).status_code == 401
    for function in CALLS:
        reply = call(client, function, {"mode": "single", "count": 1})
        assert reply.status_code == 401
        assert "data:image" not in reply.text
    signed_in = site.browser("Ada")
    assert "data:image/png" in call(signed_in, "next_items", {"mode": "single", "count": 1}).text


# Owner calls are checked on the server, not hidden in the page.


def test_results_are_for_owners_and_grading_is_for_graders(site: Site):
    assert site.browser("Ada").get("/results/").status_code == 403
    assert site.browser("Ada").get("/results/export/csv").status_code == 403
    owner = site.browser("Olga")
    assert owner.get("/results/").status_code == 200
    assert owner.get("/").status_code == 403
    assert call(owner, "next_items", {"mode": "single", "count": 1}).status_code == 403


# No upload field, no gr.load, no path in a URL, request sizes bounded.


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/upload",
        "/gradio_api/queue/join",
        "/gradio_api/run/predict",
        "/gradio_api/api/predict",
        "/gradio_api/call/predict",
        "/gradio_api/process_recording",
        "/gradio_api/vibe-edit/",
        "/gradio_api/reset",
        "/gradio_api/run-history/connect",
        "/login",
        "/results/",
    ],
)
def test_nothing_can_be_uploaded_or_run(site: Site, path: str):
    for name in ("Ada", "Olga"):
        client = site.browser(name)
        assert client.post(path, json={}).status_code in (403, 404, 405)
        assert client.post(path, files={"files": b"x"}).status_code in (403, 404, 405, 415)


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=/etc/passwd",
        "/gradio_api/file/etc/passwd",
        "/file=/etc/passwd",
        "/gradio_api/proxy=https://hub.example/x",
        "/static/../../../etc/passwd",
        "/static/%2e%2e/%2e%2e/etc/passwd",
        "/assets//etc/passwd",
        "/custom_component/x/y/z/w",
        "/gradio_api/deep_link",
        "/gradio_api/openapi.json",
        "/gradio_api/runs",
        "/monitoring",
        "/docs",
        "/openapi.json",
    ],
)
def test_no_path_in_a_url_leads_to_a_file(site: Site, path: str):
    reply = site.browser("Ada").get(path)
    assert reply.status_code == 404
    assert "root:" not in reply.text


def test_requests_have_a_largest_size_whether_or_not_they_say_theirs(site: Site):
    client = site.browser("Ada")
    json_type = {"content-type": "application/json"}
    body = b"x" * (gate.LIMIT_BYTES + 1)
    assert client.post(CALL, content=body, headers=json_type).status_code == 413
    assert client.post(CALL, content=iter([body[:9], body]), headers=json_type).status_code == 413
    assert client.post(CALL, content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    assert client.post("/enter", content=body, headers=json_type).status_code == 413


def test_the_page_has_no_field_for_files_and_loads_nothing_from_elsewhere(site: Site):
    config = site.browser("Ada").get("/config").json()
    assert {component["type"] for component in config["components"]} <= {"html", "column"}
    assert config["dependencies"] == []
    assert config["analytics_enabled"] is False
    sources = [path.read_text() for path in (Path(__file__).parents[1] / "spaces" / "grade").glob("*.*")]
    assert len(sources) >= 7
    assert not any("gr.load" in text or 'type="file"' in text for text in sources)
    policy = site.browser("Ada").get("/").headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "connect-src 'self'" in policy


# Comments are stored and shown as text.


def test_a_comment_is_stored_as_it_was_typed_and_never_becomes_html(site: Site, service: GradingService):
    client = site.browser("Ada")
    item = call(client, "next_items", {"mode": "single", "count": 1}).json()["items"][0]
    comment = "<img src=x onerror=alert(1)> & {{1}} ${1}"
    row = {"grade_id": "c1", "item_id": item["item_id"], "mode": "single", "verdict": "unsure", "comment": comment}
    call(client, "submit_rows", {"rows": [row]})
    (stored,) = [entry for entry in service.outbox.rows("grade") if entry["grade_id"] == "c1"]
    assert stored["comment"] == comment
    parts = sorted((Path(__file__).parents[1] / "spaces" / "grade").glob("*.js"))
    assert len(parts) == 3
    script = "".join(path.read_text() for path in parts)
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval("):
        assert way not in script


def test_answers_with_images_are_not_compressed_since_sizes_would_tell_images_apart(site: Site):
    reply = call(site.browser("Ada"), "next_items", {"mode": "single", "count": 1}, **{"accept-encoding": "br, gzip"})
    assert "content-encoding" not in reply.headers


def test_a_single_user_needs_no_cookie(service: GradingService):
    app = space_app("grade").create_app(service, Access(SingleDoor(), SECRET))
    client = TestClient(app, base_url=HOME)
    assert client.get("/whoami").json()["owner"] is True
    assert client.get("/").status_code == 200
