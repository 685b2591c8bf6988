\set w random(1, :W)
\set carrier random(1, 10)
select deliver(:w, :carrier);
