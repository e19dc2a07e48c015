"""The tests' own Hub against the stock clients, each in a process of its own as `HF_ENDPOINT` is read at import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from hub import HubServer, serve
from hub.faults import Fault

pytestmark = pytest.mark.hub


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubServer]:
    with serve(tmp_path / "hub", "lab/grades") as server:
        yield server


def client(hub: HubServer, folder: Path, code: str, token: str | None = None, **environment: str) -> str:
    """Run code with the stock clients; `api` is ready. Returns what it prints."""
    variables = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(folder / "home")}
    variables |= {"HF_TOKEN": token or hub.token, "HF_HUB_DISABLE_PROGRESS_BARS": "1", **environment}
    begin = "from huggingface_hub import *\nfrom huggingface_hub.errors import *\napi = HfApi()\n"
    command = [sys.executable, "-c", begin + textwrap.dedent(code)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_repos_of_all_kinds_are_made_found_and_removed(hub: HubServer, tmp_path: Path):
    printed = client(
        hub,
        tmp_path,
        """
        for kind, more in (("model", {}), ("dataset", {}), ("space", {"space_sdk": "gradio"})):
            url = api.create_repo("lab/new", repo_type=kind, private=True, **more)
            again = api.create_repo("lab/new", repo_type=kind, exist_ok=True, **more)
            assert url == again and url.repo_id == "lab/new", (url, again)
            try:
                api.create_repo("lab/new", repo_type=kind, **more)
            except HfHubHTTPError as error:
                assert error.response.status_code == 409
            info = api.repo_info("lab/new", repo_type=kind)
            assert info.private and info.sha and [file.rfilename for file in info.siblings] == [".gitattributes"]
            api.delete_repo("lab/new", repo_type=kind)
            assert not api.repo_exists("lab/new", repo_type=kind)
        print(api.whoami()["name"])
        """,
    )
    assert printed == "lab"


def test_files_small_large_and_in_parts_come_back_byte_for_byte(hub: HubServer, tmp_path: Path):
    (tmp_path / "up" / "deep").mkdir(parents=True)
    files = {"README.md": b"---\nlicense: mit\n---\ntext", "deep/a b#%.jsonl": b"{}\n", "empty.txt": b""}
    files |= {"small.parquet": b"P" * 100, "deep/parts.bin": os.urandom(12 * 2**20)}
    for name, content in files.items():
        (tmp_path / "up" / name).write_bytes(content)
    client(
        hub,
        tmp_path,
        """
        from pathlib import Path
        api.upload_folder(repo_id="lab/grades", repo_type="dataset", folder_path="up")
        down = Path(snapshot_download("lab/grades", repo_type="dataset"))
        for path in Path("up").rglob("*.*"):
            name = path.relative_to("up").as_posix()
            assert (down / name).read_bytes() == path.read_bytes(), name
            meta = get_hf_file_metadata(hf_hub_url("lab/grades", name, repo_type="dataset"), token=api.token)
            assert meta.size == path.stat().st_size and meta.etag and len(meta.commit_hash) == 40, meta
        lfs = {file.path for file in api.list_repo_tree("lab/grades", repo_type="dataset", recursive=True)
               if getattr(file, "lfs", None)}
        assert lfs == {"small.parquet", "deep/parts.bin"}, lfs
        before = api.list_repo_commits("lab/grades", repo_type="dataset")
        api.upload_folder(repo_id="lab/grades", repo_type="dataset", folder_path="up")
        assert len(api.list_repo_commits("lab/grades", repo_type="dataset")) == len(before) == 2
        """,
    )


def test_commits_are_atomic_conflicts_are_412_and_old_revisions_stay(hub: HubServer, tmp_path: Path):
    client(
        hub,
        tmp_path,
        """
        where = {"repo_id": "lab/grades", "repo_type": "dataset"}
        add = lambda path, text: CommitOperationAdd(path_in_repo=path, path_or_fileobj=text.encode())
        first = api.create_commit(**where, operations=[add("a", "1"), add("b/c", "2")], commit_message="one").oid
        second = api.create_commit(
            **where, operations=[CommitOperationDelete("b/"), add("a", "3")], commit_message="two", parent_commit=first
        ).oid
        try:
            api.create_commit(**where, operations=[add("a", "4")], commit_message="late", parent_commit=first)
            raise SystemExit("took a late commit")
        except HfHubHTTPError as error:
            assert error.response.status_code == 412
        try:
            api.create_commit(**where, operations=[add("d", "5"), CommitOperationDelete("no")], commit_message="half")
            raise SystemExit("took half a commit")
        except EntryNotFoundError:
            pass
        assert api.list_repo_files(**where) == [".gitattributes", "a"]
        assert api.list_repo_files(**where, revision=first) == [".gitattributes", "a", "b/c"]
        read = lambda revision: open(hf_hub_download(**where, filename="a", revision=revision)).read()
        assert (read(first), read(second), read("main")) == ("1", "3", "3")
        assert [commit.title for commit in api.list_repo_commits(**where)] == ["two", "one", "initial commit"]
        assert [info.path for info in api.get_paths_info("lab/grades", ["a", "no"], repo_type="dataset")] == ["a"]
        for revision, filename, error in (("main", "no", EntryNotFoundError), ("no/such", "a", RevisionNotFoundError)):
            try:
                hf_hub_download(**where, filename=filename, revision=revision)
                raise SystemExit("found what is not there")
            except error:
                pass
        """,
    )


def test_private_repos_are_hidden_and_tokens_write_only_where_they_may(hub: HubServer, tmp_path: Path):
    hub.store.add_token("hf_one_repo", "lab", writes="lab/grades")
    hub.store.add_token("hf_visitor", "visitor")
    hub.store.create("datasets", "lab/open")
    code = """
    import sys
    def status(call):
        try:
            call()
            return 200
        except HfHubHTTPError as error:
            return error.response.status_code
    add = lambda: [CommitOperationAdd(path_in_repo="a", path_or_fileobj=b"1")]
    commit = lambda name: lambda: api.create_commit(name, add(), commit_message="m", repo_type="dataset")
    read = lambda name: lambda: api.dataset_info(name)
    print([status(call(name)) for name in ("lab/grades", "lab/open") for call in (read, commit)])
    """
    assert client(hub, tmp_path, code, token="hf_one_repo") == "[200, 200, 200, 403]"
    assert client(hub, tmp_path, code, token="hf_visitor") == "[404, 404, 200, 403]"
    assert client(hub, tmp_path, code, token="hf_wrong") == "[401, 401, 401, 401]"


def test_datasets_loads_what_was_written(hub: HubServer, tmp_path: Path):
    printed = client(
        hub,
        tmp_path,
        """
        import json
        import datasets
        lines = "".join(json.dumps({"grade_id": f"g{n}", "verdict": "plausible"}) + "\\n" for n in range(7))
        for name in ("1", "2"):
            api.upload_file(path_or_fileobj=lines.encode(), path_in_repo=f"grades/{name}.jsonl", repo_id="lab/grades",
                            repo_type="dataset")
        print(len(datasets.load_dataset("lab/grades", data_files="grades/*.jsonl")["train"]))
        datasets.Dataset.from_dict({"n": list(range(5))}).push_to_hub("lab/pushed")
        print(datasets.load_dataset("lab/pushed")["train"]["n"][:])
        """,
    )
    assert printed.splitlines() == ["14", "[0, 1, 2, 3, 4]"]


def test_faults_happen_as_often_as_asked_before_or_after_the_request_took_effect(hub: HubServer):
    def ask(path: str) -> int | None:
        body = b'{"name": "x", "type": "dataset"}'
        request = Request(hub.endpoint + path, data=body, headers={"Authorization": f"Bearer {hub.token}"})
        try:
            return urlopen(request, timeout=5).status
        except HTTPError as error:
            return error.code
        except OSError:
            return None

    hub.faults.set(Fault("repos/create", 503, times=2), Fault("repos/create", 500, after=True, times=1))
    assert [ask("/api/repos/create") for _ in range(4)] == [503, 503, 500, 409]
    hub.faults.set(Fault("validate-yaml", 0, times=1))
    assert [ask("/api/validate-yaml") for _ in range(2)] == [None, 200]
    hub.faults.set(Fault("validate-yaml", 418, share=0.5))
    answers = [ask("/api/validate-yaml") for _ in range(60)]
    assert set(answers) == {200, 418}
    assert hub.faults.hits["418"] == answers.count(418)
    assert dict(hub.faults.hits) | {"418": 0} == {"503": 2, "500 after": 1, "cut": 1, "418": 0}


def test_the_hub_runs_as_a_process_and_takes_faults_over_http(tmp_path: Path):
    command = [sys.executable, "-m", "hub", "--folder", str(tmp_path / "hub"), "--dataset", "lab/grades"]
    variables = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    process = subprocess.Popen(command, env=variables, stdout=subprocess.PIPE, text=True)
    try:
        endpoint = json.loads(process.stdout.readline() if process.stdout else "{}")["endpoint"]
        rules = json.dumps([{"match": "validate", "status": 503}]).encode()
        assert json.load(urlopen(Request(f"{endpoint}/-/faults", data=rules, method="POST")))["hits"] == {}
        with pytest.raises(HTTPError, match="503"):
            urlopen(Request(f"{endpoint}/api/validate-yaml", data=b"{}", method="POST"))
        assert json.load(urlopen(f"{endpoint}/-/faults"))["hits"] == {"503": 1}
    finally:
        process.kill()
        process.wait()
