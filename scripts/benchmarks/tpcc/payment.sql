\set w random(1, :W)
\set d random(1, 10)
\set c random(1, 300)
\set amount random(1, 5000)
select pay(:w, :d, :c, :amount);
