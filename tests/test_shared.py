"""Servers that share their adapters under a URL: a local S3, and folders where S3 makes no difference."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import s3
import torch
from serving import serve, tiny_settings

from fortwo.adapters.remote import KEPT_LISTS, RemoteStore
from fortwo.adapters.shared import SharedAdapterStore
from fortwo.adapters.store import AdapterStore
from fortwo.adapters.version_files import TENSORS
from fortwo.errors import Conflict, InvalidAdapter, InvalidRequest, NotFound, StorageFailed, Unavailable
from fortwo.nn.lora_config import LoraConfig
from fortwo.records import AdapterVersion
from tests.damaged import file_size_limit

LORA = LoraConfig(r=4, alpha=8)
MANIFEST_IN = {"base_model": "tiny", "base_digest": "b" * 64, "plan": {}, "report": None}
ONE = "layers.0.lora_A.weight"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:botocore", "ignore::ResourceWarning")


@pytest.fixture(scope="module")
def server() -> Iterator[s3.S3]:
    with s3.running() as running:
        yield running


@pytest.fixture
def url(server: s3.S3) -> str:
    return f"{server.bucket()}/adapters"


def joined(root: Path, url: str, followers: Any = None) -> SharedAdapterStore:
    store = SharedAdapterStore(root, RemoteStore(url), followers)
    store.join()
    return store


def publish(store: AdapterStore, seed: int = 0, name: str = "a", *, current: bool = True) -> AdapterVersion:
    tensors = {ONE: torch.full((4, 64), float(seed))}
    return store.publish(name, tensors, LORA.to_peft("tiny"), MANIFEST_IN, current=current)


def value(store: AdapterStore, ref: str) -> float:
    return float(store.read(ref)[2][ONE][0, 0])


def seen(store: AdapterStore, name: str = "a") -> list[tuple[int, bool, tuple[str, ...], bool]]:
    return [(one.version, one.current, one.tags, one.protected) for one in store.versions(name)]


# ---------------------------------------------------------------- two servers


def test_a_version_of_one_server_is_served_by_another(tmp_path: Path, url: str) -> None:
    first, second = joined(tmp_path / "1", url), joined(tmp_path / "2", url)
    published = publish(first, 7)
    assert not second.names()
    second.refresh()
    found = second.get("a")
    assert (found.id, found.digest, found.current) == ("a@1", published.digest, True)
    assert not (Path(found.path) / TENSORS).exists()  # it comes when it is read
    assert value(second, "a") == 7
    assert (Path(found.path) / TENSORS).read_bytes() == (Path(published.path) / TENSORS).read_bytes()


def test_what_is_not_known_here_is_looked_for(tmp_path: Path, url: str) -> None:
    first, second = joined(tmp_path / "1", url), joined(tmp_path / "2", url)
    publish(first, 7)
    assert second.has("a")
    publish(first, 8)
    assert value(second, "a@2") == 8
    for ref in ("a@3", "b"):
        with pytest.raises(NotFound):
            second.get(ref)
    assert not second.has("b")
    assert not second.has("no name/../")


def test_all_changes_reach_the_other_server(tmp_path: Path, url: str) -> None:
    first, second = joined(tmp_path / "1", url), joined(tmp_path / "2", url)
    for seed in range(1, 4):
        publish(first, seed)
    second.refresh()

    def both(expected: object) -> None:
        first.refresh()
        second.refresh()
        assert seen(first) == seen(second) == expected

    second.rollback("a")
    second.tag("a@1", "stable")
    first.protect("a@3", True)
    both([(1, False, ("stable",), False), (2, True, (), False), (3, False, (), True)])
    first.promote("a@1")
    second.untag("a", "stable")
    second.protect("a@3", False)
    first.delete("a@1")
    both([(2, True, (), False), (3, False, (), False)])
    assert [one["version"] for one in second.deleted()] == [1]
    second.restore("a@1")
    both([(1, True, (), False), (2, False, (), False), (3, False, (), False)])
    assert value(second, "a@1") == 1
    second.delete("a@2", permanently=True)
    both([(1, True, (), False), (3, False, (), False)])
    assert not first.deleted()
    assert publish(second, 4).version == 4  # no number is used twice


def test_two_servers_that_publish_at_once_lose_nothing(tmp_path: Path, url: str) -> None:
    stores = [joined(tmp_path / str(number), url) for number in range(2)]
    with ThreadPoolExecutor(2) as pool:
        versions = list(pool.map(lambda seed: publish(stores[seed % 2], seed), range(8)))
    assert sorted(one.version for one in versions) == list(range(1, 9))
    for store in stores:
        store.refresh()
        assert [number for number, *_ in seen(store)] == list(range(1, 9))
        assert [value(store, one.id) for one in versions] == list(range(8))


class Interfering:
    """Followers that change the adapter from elsewhere in the moment before a version becomes current."""

    def __init__(self, change: Callable[[], object]) -> None:
        self._change = change
        self.heard: list[str] = []

    def before_current(self, version: AdapterVersion) -> None:
        self.heard.append(version.id)
        if len(self.heard) == 1:
            self._change()

    def before_delete(self, versions: Sequence[AdapterVersion]) -> None: ...


def test_a_change_that_another_server_overtook_is_made_on_top_of_that(tmp_path: Path, url: str) -> None:
    other = joined(tmp_path / "other", url)
    publish(other, 1)
    publish(other, 2, current=False)
    store = joined(tmp_path / "1", url, Interfering(lambda: other.tag("a@1", "stable")))
    store.promote("a@2")
    other.refresh()
    assert seen(store) == seen(other) == [(1, False, ("stable",), False), (2, True, (), False)]


def test_followers_hear_of_what_another_server_made_current(tmp_path: Path, url: str) -> None:
    followers = Interfering(lambda: None)
    other, store = joined(tmp_path / "1", url), joined(tmp_path / "2", url, followers)
    publish(other, 1)
    publish(other, 2, current=False)
    store.refresh()
    other.promote("a@2")
    store.refresh()
    assert followers.heard == ["a@1", "a@2"]


def test_a_version_that_followers_refuse_does_not_become_current_here(tmp_path: Path, url: str) -> None:
    def refuse() -> None:
        raise Conflict("no", hint="later")

    other = joined(tmp_path / "1", url)
    publish(other, 1)
    store = joined(tmp_path / "2", url, Interfering(refuse))
    with pytest.raises(NotFound, match="no current version"):
        AdapterStore(tmp_path / "2").get("a")
    store.refresh()  # now they agree
    assert store.get("a").id == "a@1"


def test_lists_that_nobody_needs_are_removed(tmp_path: Path, url: str) -> None:
    store = joined(tmp_path / "1", url)
    publish(store)
    for number in range(KEPT_LISTS + 3):
        store.tag("a@1", f"t{number}")
    remote = RemoteStore(url)
    assert len(remote._numbers("a")) == KEPT_LISTS
    newest = remote.newest_of("a")
    assert not remote.add_list("a", newest, remote.read_list("a", newest))  # somebody was faster
    assert not remote.add_list("a", 1, {"versions": {}, "deleted": {}})  # a writer that slept all the time
    assert len(remote._numbers("a")) == KEPT_LISTS
    assert len(store.get("a").tags) == KEPT_LISTS + 3


# ---------------------------------------------------------------- a home that joins


def test_the_versions_of_a_home_are_brought_under_the_url(tmp_path: Path, url: str) -> None:
    plain = AdapterStore(tmp_path / "1")
    publish(plain, 1)
    publish(plain, 2)
    plain.tag("a@1", "stable")
    publish(plain, 3)
    plain.delete("a@3")
    store = joined(tmp_path / "1", url)
    second = joined(tmp_path / "2", url)
    assert seen(store) == seen(second) == [(1, False, ("stable",), False), (2, True, (), False)]
    second.restore("a@3")
    assert value(second, "a@3") == 3
    assert seen(joined(tmp_path / "1", url)) == seen(second)


def test_another_adapter_of_the_same_name_is_refused_and_stays(tmp_path: Path, url: str) -> None:
    publish(joined(tmp_path / "1", url), 1)
    own = AdapterStore(tmp_path / "2")
    publish(own, 2)
    with pytest.raises(Conflict, match="another adapter 'a'") as refused:
        joined(tmp_path / "2", url)
    assert "Rename the folder" in str(refused.value.hint)
    assert value(own, "a@1") == 2


def test_a_home_belongs_to_one_store(tmp_path: Path, url: str) -> None:
    publish(joined(tmp_path / "1", url))
    with pytest.raises(Conflict, match="another store"):
        joined(tmp_path / "1", f"{url}-other")
    assert value(joined(tmp_path / "1", url), "a") == 0


# ---------------------------------------------------------------- failures


class Broken(RemoteStore):
    """Fails at the n-th writing."""

    left = 1000

    def _count(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise StorageFailed("broken", hint="later")

    def write_file(self, name: str, version: int, file: str, content: bytes) -> None:
        self._count()
        super().write_file(name, version, file, content)

    def add_list(self, name: str, number: int, state: dict[str, Any]) -> bool:
        self._count()
        return super().add_list(name, number, state)


def test_a_publication_that_breaks_off_is_seen_by_nobody(tmp_path: Path, url: str) -> None:
    remote = Broken(url)
    store, other = SharedAdapterStore(tmp_path / "1", remote), joined(tmp_path / "2", url)
    publish(store, 1)
    for step in range(1, 6):
        remote.left = step
        with pytest.raises(StorageFailed):
            publish(store, 2)
        other.refresh()
        assert seen(store) == seen(other) == [(1, True, (), False)]
    remote.left = 1000
    published = publish(store, 2)
    other.refresh()
    assert [one.id for one in other.versions("a")] == ["a@1", published.id]
    assert value(other, "a") == 2


def test_damaged_objects_are_named(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store"
    publish(joined(tmp_path / "1", url))
    objects = tmp_path / "store" / "adapters" / "a" / "1"
    second = joined(tmp_path / "2", url)
    (objects / TENSORS).write_bytes(b"other")
    with pytest.raises(InvalidAdapter, match="not what was published"):
        second.read("a")
    (objects / TENSORS).unlink()
    (tmp_path / "2" / "a" / "1" / TENSORS).unlink()
    with pytest.raises(StorageFailed, match=r"a/1/adapter_model\.safetensors is missing"):
        second.read("a")
    (objects / "manifest.json").write_bytes(b"{}")
    third = joined(tmp_path / "3", url)
    assert not third.names()
    with pytest.raises(Conflict, match="manifest of a@1"):
        third.get("a@1")


def test_a_url_with_other_data_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"")
    with pytest.raises(Conflict, match=r"cat\.png") as refused:
        RemoteStore(f"file://{tmp_path}/photos")
    assert refused.value.param == "adapters_url"
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "fortwo-adapters.json").write_text('{"format": 2, "id": "x"}')
    with pytest.raises(Conflict, match="this version of fortwo"):
        RemoteStore(f"file://{tmp_path}/later")


def test_bad_urls_say_what_to_do(server: s3.S3) -> None:
    for url, error, text in (
        ("nothing://x", InvalidRequest, "fortwo\\[s3\\]"),
        ("s3://there-is-no-such-bucket/x", InvalidRequest, "Create the bucket"),
    ):
        with pytest.raises(error) as refused:
            RemoteStore(url)
        assert refused.value.param == "adapters_url"
        assert text.replace("\\", "") in str(refused.value.hint)


def test_missing_credentials(server: s3.S3, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/none")
    with pytest.raises(StorageFailed) as refused:
        RemoteStore(url)
    assert refused.value.code == "adapters_url_denied"
    assert "AWS_ACCESS_KEY_ID" in str(refused.value.hint)


def test_a_store_that_refuses_to_write_loses_nothing(tmp_path: Path) -> None:
    url = f"file://{tmp_path}/store"
    store = joined(tmp_path / "1", url)
    publish(store, 1)
    big = Path(store.get("a").path) / TENSORS
    with file_size_limit(big.stat().st_size - 1), pytest.raises(StorageFailed):
        publish(store, 2)
    assert seen(store) == seen(joined(tmp_path / "2", url)) == [(1, True, (), False)]
    publish(store, 2)
    assert value(joined(tmp_path / "2", url), "a") == 2


def test_credentials_that_may_only_read(tmp_path: Path) -> None:
    """Versions are served, and a publication says what is missing."""
    import boto3
    import fsspec.config

    with s3.running() as server, pytest.MonkeyPatch.context() as patch:
        url = server.bucket()
        publish(joined(tmp_path / "1", url), 5)
        iam = boto3.client("iam", endpoint_url=server.url)
        iam.create_user(UserName="reader")
        allowed = '{"Effect": "Allow", "Action": ["s3:Get*", "s3:List*", "s3:Head*"], "Resource": "*"}'
        iam.put_user_policy(
            UserName="reader",
            PolicyName="read",
            PolicyDocument=f'{{"Version": "2012-10-17", "Statement": [{allowed}]}}',
        )
        key = iam.create_access_key(UserName="reader")["AccessKey"]
        httpx.post(f"{server.url}/moto-api/reset-auth", content=b"0").raise_for_status()
        patch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
        patch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])
        assert fsspec.config.conf["s3"]["endpoint_url"] == server.url
        reader = joined(tmp_path / "2", url)
        assert value(reader, "a") == 5
        with pytest.raises(StorageFailed) as refused:
            publish(reader, 6)
        assert refused.value.code == "adapters_url_denied"
        assert seen(reader) == [(1, True, (), False)]


def test_a_server_that_is_gone(tmp_path: Path) -> None:
    with s3.running() as server:
        url = server.bucket()
        store, late = joined(tmp_path / "1", url), joined(tmp_path / "2", url)
        publish(store, 5)
        late.refresh()
        late.read("a")
    for call in (lambda: publish(store, 6), lambda: store.rollback("a"), store.refresh, lambda: store.delete("a")):
        with pytest.raises(Unavailable) as refused:
            call()
        assert refused.value.code == "adapters_url_unreachable"
    for one in (store, late):
        assert seen(one) == [(1, True, (), False)]
        assert value(one, "a") == 5  # what is here is served


# ---------------------------------------------------------------- servers


def test_a_server_answers_with_what_another_one_published(tmp_path: Path, tiny: Path, url: str) -> None:
    from parts import as_decoder, random_lora
    from tiny import tiny_model

    first = tiny_settings(tmp_path / "1", tiny, adapters_url=url)
    second = tiny_settings(tmp_path / "2", tiny, adapters_url=url)
    with serve(first) as one, serve(second) as two:
        assert one.chat().status_code == 200
        info = one.state.catalog.model_info("tiny")
        assert info is not None
        lora = random_lora(as_decoder(tiny_model("llama", num_hidden_layers=2, max_position_embeddings=1024)), 1)
        manifest = {"base_model": "tiny", "base_digest": info.digest}
        published = one.state.adapters.publish("new", lora.state(), lora.config.to_peft("tiny"), manifest, current=True)
        replies = [each.chat(model="new", temperature=0).json() for each in (one, two)]
        assert {reply["system_fingerprint"] for reply in replies} == {f"fp_{published.digest[:12]}"}
        assert replies[0]["choices"] == replies[1]["choices"]
        deleted = two.http.delete("/api/adapters/new")
        assert deleted.status_code == 200, deleted.text
        one.state.adapters.refresh()  # type: ignore[attr-defined]
        assert one.chat(model="new").status_code == 404


def test_without_the_setting_nothing_of_it_is_loaded(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from fortwo.adapters.shared import open_store;"
        f"open_store(Path({str(tmp_path)!r}), None).names();"
        "print([one for one in ('fsspec', 's3fs', 'aiobotocore', 'boto3') if one in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
