"""The cluster's certificates and kubeconfigs, made by openssl."""

import pathlib

from harness.process import run

# Elliptic curves, because an RSA key takes longer to make than the API server takes to start.
EC = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]


class Pki:
    def __init__(self, directory: pathlib.Path, server: str, server_names: list[str]):
        self.directory, self.server = directory, server
        directory.mkdir()
        run("openssl", "req", "-x509", *EC, "-days", "3650", "-keyout", self.file("ca.key"), "-out", self.file("ca.crt"), "-subj", "/CN=clip-e2e-ca",
            "-addext", "keyUsage=critical,keyCertSign,cRLSign")
        run("openssl", "ecparam", "-genkey", "-name", "prime256v1", "-noout", "-out", self.file("sa.key"))
        run("openssl", "ec", "-in", self.file("sa.key"), "-pubout", "-out", self.file("sa.pub"))
        self.issue("apiserver", "/CN=kube-apiserver", "subjectAltName=" + ",".join(server_names))

    def file(self, name: str) -> pathlib.Path:
        return self.directory / name

    def issue(self, name: str, subject: str, extension: str) -> None:
        self.file(f"{name}.ext").write_text(extension)
        run("openssl", "req", *EC, "-keyout", self.file(f"{name}.key"), "-out", self.file(f"{name}.csr"), "-subj", subject)
        run("openssl", "x509", "-req", "-in", self.file(f"{name}.csr"), "-CA", self.file("ca.crt"), "-CAkey", self.file("ca.key"), "-CAcreateserial",
            "-days", "3650", "-out", self.file(f"{name}.crt"), "-extfile", self.file(f"{name}.ext"))

    def kubeconfig(self, name: str, subject: str) -> pathlib.Path:
        """A client of the API server that the certificate's subject names: its user and group."""
        self.issue(name, subject, "extendedKeyUsage=clientAuth")
        path = self.file(f"{name}.kubeconfig")
        path.write_text(
            "apiVersion: v1\nkind: Config\ncurrent-context: e2e\ncontexts: [{name: e2e, context: {cluster: e2e, user: e2e}}]\n"
            f"clusters: [{{name: e2e, cluster: {{server: '{self.server}', certificate-authority: '{self.file('ca.crt')}'}}}}]\n"
            f"users: [{{name: e2e, user: {{client-certificate: '{self.file(name + '.crt')}', client-key: '{self.file(name + '.key')}'}}}}]\n"
        )
        return path
