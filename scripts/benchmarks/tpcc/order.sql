\set w random(1, :W)
\set d random(1, 10)
\set c random(1, 300)
select place_order(:w, :d, :c);
