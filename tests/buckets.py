"""A bucket on a server of this machine's that speaks S3."""


def connect(server, monkeypatch):
    """Return the bucket as obstore sees it, with what is in it; the environment leads to it."""
    import obstore
    from obstore.store import HTTPStore, S3Store

    for name, value in {
        "AWS_ENDPOINT_URL": server, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    plain = {"allow_http": True}
    obstore.put(HTTPStore.from_url(server, client_options=plain), "bucket", b"")
    return S3Store("bucket", endpoint=server, client_options=plain)


def connect_empty(server, monkeypatch):
    """Return the bucket, emptied."""
    import obstore

    store = connect(server, monkeypatch)
    obstore.delete(store, [one["path"] for one in obstore.list(store).collect()])
    return store
