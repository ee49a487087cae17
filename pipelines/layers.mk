# Rules that pipelines share: $O is the folder of outputs, $O/model the checkpoint, $O/train.zarr and $O/test.zarr tokens or pixels.

PRECISION ?= auto

$O/loss.png: $O/model
	pixseq show $< --plot $@ --overwrite > /dev/null

$O/%.features.zarr: $O/model $O/%.zarr
	pixseq features $^ --precision $(PRECISION) --resume --overwrite -o $@

$O/%.pixels.zarr: $O/%.zarr
	pixseq features pixels $< --precision $(PRECISION) --resume --overwrite -o $@

$O/%.random.zarr: $O/model $O/%.zarr
	pixseq features $^ --random-init 0 --precision $(PRECISION) --resume --overwrite -o $@

$O/probe.json: $(foreach f,features pixels random,$O/train.$f.zarr $O/test.$f.zarr)
	pixseq probe $O/train.features.zarr --test $O/test.features.zarr --concat 5 --overwrite -o $@ --plot $O/probe.png \
	  --baseline "raw pixels=$O/train.pixels.zarr:$O/test.pixels.zarr" \
	  --baseline "random model=$O/train.random.zarr:$O/test.random.zarr"

$O/samples.png: $O/model
	pixseq sample $< --count 64 --seed 0 --precision $(PRECISION) --overwrite -o $@

$O/completions.png: $O/model $O/test.zarr
	pixseq sample $O/model --prompt $O/test.zarr --keep 0.5 --count 8 --completions 4 --seed 0 --precision $(PRECISION) \
	  --overwrite -o $@

# Artifacts are folders with many files; none of them is an intermediate to delete.
.SECONDARY:
.DELETE_ON_ERROR:
