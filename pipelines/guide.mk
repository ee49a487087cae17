# A guide is run as it is read: the `sh` blocks of its README.md, one after another, in out/, on pictures made from
# embedded digits. NEEDED names files beside the guide that its blocks read.

.PHONY: all clean

all: out/photos
	cd out && find . -mindepth 1 -maxdepth 1 ! -name photos -exec rm -rf {} +
	$(if $(NEEDED),cp $(NEEDED) out)
	sed -n '/^```sh$$/,/^```$$/{/^```/d;p}' README.md | (cd out && bash -euxo pipefail)

out/photos: ../photos.py
	python $< $@

clean:
	rm -rf out
