// Threads and the engine they run.
#include "engine.h"

#include "bind/bind.h"

namespace pennyweight {

void bind_engine(nb::module_& module) {
    nb::class_<ThreadPool>(module, "Threads", nb::is_weak_referenceable(), "Threads that engines share, one step at a time.")
        .def("__init__", [](ThreadPool* self, int count) { new (self) ThreadPool(threads(count)); }, "count"_a);

    nb::class_<Engine>(module, "Engine", "Runs tokens through a model; see runtime/engine.py for the face users see.")
        .def(
            "__init__",
            [](Engine* self, const Model& model, std::shared_ptr<ThreadPool> pool, const std::string& kernels) {
                new (self) Engine(model, given(std::move(pool)), kernels_named(kernels));
            },
            "model"_a, "threads"_a, "kernels"_a = "best")
        .def("open", &Engine::open, "capacity"_a)
        .def("close", &Engine::close)
        .def("can_go_back", &Engine::can_go_back, "sequence"_a, "tokens"_a)
        .def("copy", &Engine::copy, "source"_a, "target"_a, "tokens"_a)
        .def("fill", &Engine::fill, "sequence"_a, "tokens"_a)
        .def("trouble", &Engine::trouble, "sequence"_a)
        .def(
            "step",
            [](Engine& e, In<std::int32_t, 2> rows, Out<float, 2> logits) {
                expect(rows.shape(1) == 5, "rows is (n, 5): sequence, position, token, wants logits, sparse");
                std::vector<Row> list;
                std::size_t wanted = 0;
                for (std::size_t i = 0; i < rows.shape(0); i++) {
                    const std::int32_t* r = rows.data() + 5 * i;
                    list.push_back({r[0], r[1], r[2], r[3] != 0, r[4] != 0});
                    wanted += r[3] != 0;
                }
                expect(logits.shape(0) == wanted && int(logits.shape(1)) == e.model().head.out(),
                       "logits is (rows that want them, vocabulary)");
                nb::gil_scoped_release released;
                e.step(list, logits.data());
            },
            "rows"_a.noconvert(), "logits"_a.noconvert())
        .def_prop_ro("threads", &Engine::threads)
        .def_prop_ro("kernels", [](const Engine& e) { return std::string(e.kernels().name); })
        .def_prop_ro("state_bytes", &Engine::state_bytes)
        .def(
            "work_bytes",
            [](const Engine& e, int rows) {
                expect(rows >= 1 && rows <= Engine::kMaxRows, "as many rows as a step takes");
                return e.work_bytes(rows);
            },
            "rows"_a)
        .def_prop_ro("unused_bytes", &Engine::unused_bytes)
        .def_prop_ro("sparse",
                     [](const Engine& e) {
                         const auto& found = e.sparse();
                         return std::make_tuple(found.kept, found.columns, found.read, found.bytes);
                     })
        .def_prop_ro("spent",
                     [](const Engine& e) {
                         return std::make_tuple(e.spent().products, e.spent().attention, e.spent().all);
                     })
        .def_ro_static("max_rows", &Engine::kMaxRows);
}

}  // namespace pennyweight
