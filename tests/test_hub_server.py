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
    variables = hub.variables(folder / "home", token, **environment)
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


def test_repos_move_and_the_old_name_leads_to_the_new_one(hub: HubServer, tmp_path: Path):
    client(
        hub,
        tmp_path,
        """
        api.create_repo("lab/model")
        api.upload_file(path_or_fileobj=b"weights", path_in_repo="a.txt", repo_id="lab/model")
        api.move_repo("lab/model", "lab/better")
        assert open(hf_hub_download("lab/better", "a.txt"), "rb").read() == b"weights"
        assert api.model_info("lab/model").id == "lab/better"
        assert open(hf_hub_download("lab/model", "a.txt"), "rb").read() == b"weights"
        assert api.upload_file(path_or_fileobj=b"2", path_in_repo="b.txt", repo_id="lab/model").oid
        assert api.list_repo_files("lab/better") == [".gitattributes", "a.txt", "b.txt"]
        api.create_repo("lab/third")
        for old, new, status in (("lab/third", "lab/better", 409), ("lab/third", "other/third", 403)):
            try:
                api.move_repo(old, new)
                raise SystemExit("moved")
            except HfHubHTTPError as error:
                assert error.response.status_code == status
        """,
    )


def test_a_gated_repo_is_seen_by_all_and_read_by_those_let_in(hub: HubServer, tmp_path: Path):
    hub.store.add_token("hf_visitor", "visitor")
    client(
        hub,
        tmp_path,
        """
        api.create_repo("lab/gated")
        api.upload_file(path_or_fileobj=b"1", path_in_repo="a.txt", repo_id="lab/gated")
        api.update_repo_settings("lab/gated", gated="manual")
        visitor = HfApi(token="hf_visitor")
        assert visitor.model_info("lab/gated").gated == "manual"
        for call in (lambda: visitor.hf_hub_download("lab/gated", "a.txt"), lambda: visitor.auth_check("lab/gated"),
                     lambda: HfApi(token=False).hf_hub_download("lab/gated", "a.txt")):
            try:
                call()
                raise SystemExit("let in")
            except GatedRepoError as error:
                assert error.response.status_code in (401, 403)
        assert open(api.hf_hub_download("lab/gated", "a.txt")).read() == "1"
        api.grant_access("lab/gated", "visitor")
        assert open(visitor.hf_hub_download("lab/gated", "a.txt")).read() == "1"
        api.update_repo_settings("lab/gated", gated=False, private=True)
        assert not visitor.repo_exists("lab/gated") and api.model_info("lab/gated").private
        """,
    )


def test_branches_and_tags_are_made_read_and_deleted(hub: HubServer, tmp_path: Path):
    client(
        hub,
        tmp_path,
        """
        where = {"repo_id": "lab/grades", "repo_type": "dataset"}
        put = lambda text, **more: api.upload_file(path_or_fileobj=text, path_in_repo="a", **where, **more).oid
        first = put(b"1")
        api.create_tag(**where, tag="v1", tag_message="one")
        api.create_branch(**where, branch="try/this", revision=first[:8])
        second, third = put(b"2"), put(b"3", revision="try/this")
        read = lambda revision: open(hf_hub_download(**where, filename="a", revision=revision)).read()
        assert [read(revision) for revision in ("v1", "main", "try/this", first[:7])] == ["1", "2", "3", "1"]
        refs = api.list_repo_refs(**where)
        assert {ref.name: ref.target_commit for ref in refs.branches} == {"main": second, "try/this": third}
        assert {ref.ref: ref.target_commit for ref in refs.tags} == {"refs/tags/v1": first}
        api.create_tag(**where, tag="v1", exist_ok=True)
        api.create_branch(**where, branch="try/this", exist_ok=True)
        statuses = []
        for call in (lambda: api.create_tag(**where, tag="v1"), lambda: api.create_branch(**where, branch="try/this"),
                     lambda: api.create_branch(**where, branch="refs/pr/1"),
                     lambda: api.delete_branch(**where, branch="main"), lambda: put(b"4", revision="v1"),
                     lambda: api.create_tag(**where, tag="v2", revision="no"),
                     lambda: api.delete_tag(**where, tag="no")):
            try:
                call()
            except HfHubHTTPError as error:
                statuses.append(error.response.status_code)
        assert statuses == [409, 409, 400, 403, 400, 404, 404], statuses
        api.delete_tag(**where, tag="v1")
        api.delete_branch(**where, branch="try/this")
        assert not api.revision_exists(**where, revision="v1") and not api.revision_exists(**where, revision="try/this")
        """,
    )


def test_a_pull_request_is_read_by_its_ref_and_merged(hub: HubServer, tmp_path: Path):
    hub.store.add_token("hf_visitor", "visitor")
    hub.store.add_token("hf_reader", "reader", writes="")
    client(
        hub,
        tmp_path,
        """
        where = {"repo_id": "lab/model"}
        api.create_repo("lab/model")
        add = lambda path, text: [CommitOperationAdd(path_in_repo=path, path_or_fileobj=text.encode())]
        api.create_commit(**where, operations=add("a", "1"), commit_message="one")
        visitor = HfApi(token="hf_visitor")
        made = visitor.create_commit(**where, operations=add("b.bin", "2"), commit_message="two", create_pr=True)
        assert (made.pr_num, made.pr_revision) == (1, "refs/pr/1"), made
        visitor.create_commit(**where, operations=add("c", "3"), commit_message="three", revision="refs/pr/1")
        assert api.list_repo_files(**where) == [".gitattributes", "a"]
        assert api.list_repo_files(**where, revision="refs/pr/1") == [".gitattributes", "a", "b.bin", "c"]
        assert open(hf_hub_download(**where, filename="b.bin", revision="refs/pr/1")).read() == "2"
        pulls = api.list_repo_refs(**where, include_pull_requests=True).pull_requests
        assert [ref.ref for ref in pulls] == ["refs/pr/1"]
        for token, status in (("hf_visitor", 403), ("hf_reader", 403), (False, 401)):
            try:
                HfApi(token=token).create_commit(
                    **where, operations=add("d", "4"), commit_message="m", create_pr=token != "hf_visitor"
                )
                raise SystemExit(f"{token} may write")
            except HfHubHTTPError as error:
                assert error.response.status_code == status, error
        api.create_commit(**where, operations=add("e", "5"), commit_message="beside")
        (pull,) = api.get_repo_discussions(**where, discussion_status="open", discussion_type="pull_request")
        assert (pull.num, pull.title, pull.author, pull.status) == (1, "two", "visitor", "open")
        api.merge_pull_request(**where, discussion_num=1)
        details = api.get_discussion_details(**where, discussion_num=1)
        assert details.status == "merged" and details.merge_commit_oid == api.model_info("lab/model").sha
        assert api.list_repo_files(**where) == [".gitattributes", "a", "b.bin", "c", "e"]
        """,
    )


def test_a_commit_during_another_one_of_the_same_repo_is_409(hub: HubServer, tmp_path: Path):
    hub.store.commit_takes_s = 1.0
    client(
        hub,
        tmp_path,
        """
        from concurrent.futures import ThreadPoolExecutor
        hub_of = {"lab/grades": "dataset", "lab/model": "model"}
        api.create_repo("lab/model")
        def commit(name):
            try:
                add = [CommitOperationAdd(path_in_repo="a", path_or_fileobj=b"1")]
                api.create_commit(name, add, commit_message="m", repo_type=hub_of[name])
                return 200
            except HfHubHTTPError as error:
                return error.response.status_code
        with ThreadPoolExecutor() as pool:
            statuses = list(pool.map(commit, ["lab/grades", "lab/grades", "lab/model"]))
        assert sorted(statuses[:2]) == [200, 409] and statuses[2] == 200, statuses
        """,
    )


def test_front_matter_is_checked_before_a_commit_and_told_by_repo_info(hub: HubServer, tmp_path: Path):
    client(
        hub,
        tmp_path,
        r"""
        api.create_repo("lab/model")
        put = lambda text: api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id="lab/model")
        for text, reason in (("---\ntags: [a, b\n---\n", "Bad YAML"), ("---\ntags: [1]\n---\n", '"tags" must be'),
                             ("---\nlicense: other\n---\n", "license_name")):
            try:
                put(text)
                raise SystemExit(f"took {text}")
            except ValueError as error:
                assert reason in str(error), error
        put("---\nlicense: apache-2.0\nlibrary_name: diffusers\ntags: [cells]\nbase_model: lab/base\n---\n# Model\n")
        info = api.model_info("lab/model")
        assert info.card_data.license == "apache-2.0" and info.library_name == "diffusers"
        assert {"cells", "license:apache-2.0", "base_model:lab/base"} <= set(info.tags)
        assert [found.id for found in api.list_models(author="lab", filter="cells")] == ["lab/model"]
        assert [found.id for found in api.list_models(author="lab", filter="no")] == []
        assert [found.id for found in api.list_datasets(author="lab", search="GRA")] == ["lab/grades"]
        assert list(HfApi(token=False).list_datasets(author="lab")) == []
        """,
    )


def test_a_long_folder_comes_in_pages(hub: HubServer, tmp_path: Path):
    repo = hub.store.repo("datasets", "lab/grades", hub.token)
    lines = [{"key": "file", "value": {"path": f"grades/{number:04}", "content": ""}} for number in range(2100)]
    hub.store.commit(repo, "main", [{"key": "header", "value": {"summary": "many"}}, *lines])
    code = "print(len(list(api.list_repo_tree('lab/grades', 'grades', repo_type='dataset'))))"
    assert client(hub, tmp_path, code) == "2100"
    assert sum("/tree/main" in request for request in hub.faults.requests) == 3
