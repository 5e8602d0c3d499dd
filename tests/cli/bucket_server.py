"""A bucket of Google Cloud Storage on this machine: `python bucket_server.py` prints its port.

The emulator knows nothing of generations, with which tensorstore sees that nobody else has replaced
an object since it read it; they are added here.
"""

import urllib.parse
from functools import partial
from http.server import HTTPServer

from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.server import RequestHandler
from gcp_storage_emulator.storage import Storage


class Handler(RequestHandler):
    def do_GET(self):
        generation = self.generation()
        if generation != "0" and self.query().get("ifGenerationNotMatch") == generation:
            self.refuse(304)
        else:
            super().do_GET()

    def do_POST(self):
        if self.query().get("ifGenerationMatch", self.generation()) != self.generation():
            self.refuse(412)
        else:
            super().do_POST()

    def do_DELETE(self):
        if self.query().get("ifGenerationMatch", self.generation()) != self.generation():
            self.refuse(412)
        else:
            super().do_DELETE()

    def end_headers(self):
        if self.query().get("alt") == "media":
            self.send_header("x-goog-generation", self.generation())
        super().end_headers()

    def refuse(self, status: int) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(status)
        self.send_header("content-length", "0")
        self.end_headers()

    def query(self) -> dict[str, str]:
        return dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query))

    def generation(self) -> str:
        """Of the object that the request is about; "0" if there is none."""
        path = urllib.parse.urlsplit(self.path).path
        bucket, _, name = path.partition("/b/")[2].partition("/o")
        name = self.query().get("name") or urllib.parse.unquote(name.removeprefix("/"))
        return self.storage.objects.get(bucket, {}).get(name, {}).get("generation", "0")

    def log_message(self, format: str, *args: object) -> None:
        pass


if __name__ == "__main__":
    storage = Storage(use_memory_fs=True)
    buckets.create_bucket("bucket", storage)
    server = HTTPServer(("localhost", 0), partial(Handler, storage))
    print(server.server_address[1], flush=True)
    server.serve_forever()
