"""Image bundles: a container image in one file, for hospitals that no registry reaches.

A bundle is a plain tar file of these members, in this order:

- ``SHA256SUMS``: the manifest, in `sha256sum`'s own format, over every member but itself and the signature.
- ``SHA256SUMS.sig``: 64 bytes, Ed25519 over ``SHA256SUMS``. An unsigned bundle has none, and is never loaded.
- ``bundle.json``: what the image is, who signed it, until when it holds, its layers.
- ``config.json``: the image's configuration; its SHA-256 is the image id.
- ``layers/DIFF_ID.tar.gz``: each layer once; the SHA-256 of what unpacks is its diff id, which the configuration names.
- ``sbom.cdx.json``: the parts list, CycloneDX, where syft was there to write it.

Rules:

- There is one spelling of a bundle: every header, every padding byte and the end follow from names and sizes. So no
  byte can be changed unseen, and there is no room for links, paths, second members or extensions of tar.
- The signature is checked before anything else is read. After that each member's SHA-256 must be the manifest's, then
  the chain holds: image id = SHA-256 of the configuration, diff id = SHA-256 of the layer.
- Where the signature does not hold, the rest is read only to say why; nothing of it is used.
- What unpacks is capped by the size that the signed description declares: no bomb unpacks.
- Memory does not grow with the image.
- A bundle of changed layers (`since`) takes the others from a base. A base need not be trusted: each layer must hash to
  the diff id that the signed configuration names.

A hospital checks the same with nothing of ours, in an empty folder, so that nothing unverified lies over its key::

    tar xf BUNDLE --directory check; cd check
    openssl pkeyutl -verify -pubin -inkey ../signer.pub -rawin -in SHA256SUMS -sigfile SHA256SUMS.sig
    sha256sum -c SHA256SUMS
"""
