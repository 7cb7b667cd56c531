"""No password of a URI is shown or kept."""

import pytest

from cluster import stage
from cluster.redaction import hidden, without_user
from cluster.stage import Source

FORMS = {
    "s3://key:se+c=ret@bucket/x?region=eu": "s3://bucket/x?region=eu",
    "s3://b?endpoint_override=http://:secret@store&scheme=http": "s3://b?endpoint_override=http://store&scheme=http",
    "https://me:secret@host:5000/p": "https://host:5000/p",
    "https://secret@host/p": "https://host/p",
    "HTTPS://me:se@c:ret@host/p": "HTTPS://host/p",
    "postgresql+psycopg2://me:se/cr?e#t@host/db": "postgresql+psycopg2://me@host/db",
    "postgresql://me:se@cret@host/db": "postgresql://me@host/db",
    "postgresql://host/db?user=me&password=secret&sslmode=on": "postgresql://host/db?user=me&sslmode=on",
    "postgresql://host/db?password=secret": "postgresql://host/db",
    "mssql+pyodbc:///?odbc_connect=PWD%3Dsecret": "mssql+pyodbc:///",
    "abfss://box:secret@account.dfs.core.windows.net/x": "abfss://box@account.dfs.core.windows.net/x",
    "abfs://:secret@account/x": "abfs://account/x",
    "abfs://account/x?client_secret=secret&sig=secret&tenant_id=1": "abfs://account/x?tenant_id=1",
    "https://h/x?X-Amz-Signature=secret&X-Amz-Security-Token=secret": "https://h/x",
    "http://h/x?auth=secret&key=secret&b=1#c": "http://h/x?b=1#c",
    "http://h/x?session=secret#access_token=secret&b=1": "http://h/x#b=1",
    "mssql://h;Database=d;PWD=secret;Timeout=1": "mssql://h;Database=d;Timeout=1",
    "https://h/x?X-Amz-Credential=secret&X-Amz-Date=1": "https://h/x?X-Amz-Date=1",
    "no https://a:secret@b, then http://c:secret@d/e: why?": "no https://b, then http://d/e: why?",
    "https://a:secret@b,https://c:secret@d": "https://d",
    "'http://a:secret@b/c'": "'http://b/c'",
    "me:secret@host/db": "host/db",
    "me:s@ecret#?@host:5432": "host:5432",
    "cannot reach 'me:secret@10.0.0.1:6379'": "cannot reach '10.0.0.1:6379'",
    "--uri=me:secret@localhost.": "--uri=localhost.",
    "[me:secret@[::1]:80]": "[[::1]:80]",
    "me+box.de:secret@host": "host",
    "at https://me:my secret@host/p b@c": "at https://host/p b@c",
    "https://me:se cret @@host": "https://host",
    "https://my user:secret@host/p": "https://my host/p",
    "https://me:a secret/x@host/p": "https://host/p",
    "https://me:se/cret@host/p": "https://host/p",
    "postgresql://me:se cr/et@host/db": "postgresql://me@host/db",
    "http://host:80, https://me:a secret@host": "http://host:80, https://host",
}
WHOLE = {  # a config's value is one URI, blanks and all
    "https://h/x?token=my secret&b=1": "https://h/x?b=1",
    "s3://key:12 secret@b/a c.jpg": "s3://b/a c.jpg",
}
PLAIN = ["gs://anonymous@bucket/x", "hdfs://me@host:8020/x", "http://host:80/a@b", "sqlite:////a b@c/mlflow.db", "red: a@b"]
PLAIN += [
    "s3://b/a;secret.jpg",
    "file:///a#token/b?",
    "http://h/?a=1;b=2&c&&d=#e",
    "s3://bucket/x?region=eu&scheme=http",
    "is it? token=1",
    "",
    "://",
    "postgresql://host/db?options=a@b",
    "a://b?",
    "me@host.org, <mailto:me@host.org> and git@host:group/project.git",
    "name:me@1, at 12:30:me@2x.png",
    "model:3.11@sha256:abc",
    "R@10:R@50, recall: 5@10",
    "/data/a:b@c/x.jpg",
    "photos/a:b@c.jpg",
    r"C:\me@host\x.jpg",
    "at http://host:80 is not what me@host.org gave",
    "at http://host: no answer; ask me@host.org",
    "(http://host:80), http://host:8080/a: ask me@host.org",
    "http://[::1]:80/x a@b",
]


@pytest.mark.parametrize("text", FORMS)
def test_secrets_are_taken_out_wherever_they_stand(text: str) -> None:
    found = without_user(text)
    assert "secret" not in found
    if "," not in text:
        assert found == FORMS[text]
    assert without_user(found) == found


@pytest.mark.parametrize("text", WHOLE)
def test_a_value_is_one_uri(text: str) -> None:
    assert hidden(text) == WHOLE[text]
    assert hidden(WHOLE[text]) == WHOLE[text]


@pytest.mark.parametrize("text", PLAIN)
def test_what_is_no_secret_stays(text: str) -> None:
    assert hidden(text) == without_user(text) == text


def test_a_source_has_one_digest_whatever_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "fingerprint", lambda _: [("a.jpg", 3, 7)])
    sources = [Source("evaluate.images", path, kept=True) for path in ("s3://key:a@b/x", "s3://key:c@b/x", "s3://b/x")]
    assert sources[0].fingerprint() == sources[1].fingerprint() == sources[2].fingerprint() == ["s3://b/x", [("a.jpg", 3, 7)]]
    assert [source.secret() is None for source in sources] == [False, False, True]
    assert Source("evaluate.images", "a:b@c.d", kept=True).secret() is None


def test_configs_and_long_texts() -> None:
    config = {"tracking": {"uri": "http://a:b@h"}, "files": ["s3://a:b@c", 3, None], "seed": 1}
    assert hidden(config) == {"tracking": {"uri": "http://h"}, "files": ["s3://c", 3, None], "seed": 1}
    for text in ("a" * 3_000_000, "a://" + "b" * 3_000_000, "a://?" + "b" * 3_000_000):
        assert without_user(text) == text
