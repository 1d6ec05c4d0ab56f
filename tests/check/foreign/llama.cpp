// A forward pass of Llama in plain C++, with the writer of docs/recording.md: a program that knows no refllm.
//
//     program model.safetensors layers heads kv_heads head_dim eps theta run.safetensors right|swapped id id id ...
//
// swapped: gate and up of layer 1 change places.

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <iterator>

using Array = std::vector<float>;

static std::string header;
static std::vector<char> body;
static std::map<std::string, Value> shown;
static std::vector<Array*> kept;

static Array tensor(const std::string& name) {
    size_t at = header.find("\"" + name + "\"");
    if (at == std::string::npos) { std::exit(3); }
    at = header.find('[', header.find("\"data_offsets\"", at));
    char* next;
    const size_t begin = std::strtoull(&header[at + 1], &next, 10), end = std::strtoull(next + 1, nullptr, 10);
    Array out((end - begin) / 4);
    std::memcpy(out.data(), body.data() + begin, end - begin);
    return out;
}

static const Array& show(const std::string& name, const Array& x, std::vector<int64_t> shape) {
    Array* copy = new Array(x);
    kept.push_back(copy);
    shape.push_back(int64_t(x.size()));
    for (size_t i = 0; i + 1 < shape.size(); i++) shape.back() /= shape[i];
    shown[name] = {"F32", shape, copy->data(), copy->size() * 4};
    return *copy;
}

static Array linear(const Array& x, const Array& weight, size_t rows) {
    const size_t in = x.size() / rows, out = weight.size() / in;
    Array y(rows * out);
    for (size_t s = 0; s < rows; s++)
        for (size_t o = 0; o < out; o++) {
            float sum = 0;
            for (size_t i = 0; i < in; i++) sum += x[s * in + i] * weight[o * in + i];
            y[s * out + o] = sum;
        }
    return y;
}

static Array norm(const Array& x, const Array& weight, float eps) {
    Array y(x);
    const size_t n = weight.size();
    for (size_t at = 0; at < x.size(); at += n) {
        float sum = 0;
        for (size_t i = 0; i < n; i++) sum += x[at + i] * x[at + i];
        const float scale = 1 / std::sqrt(sum / n + eps);
        for (size_t i = 0; i < n; i++) y[at + i] = x[at + i] * scale * weight[i];
    }
    return y;
}

static Array rotated(const Array& x, size_t rows, size_t D, double theta) {
    Array y(x);
    const size_t heads = x.size() / rows / D, half = D / 2;
    for (size_t s = 0; s < rows; s++)
        for (size_t h = 0; h < heads; h++)
            for (size_t i = 0; i < half; i++) {
                const double angle = s * std::pow(theta, -2.0 * i / D);
                const float c = float(std::cos(angle)), n = float(std::sin(angle));
                const size_t a = (s * heads + h) * D + i, b = a + half;
                y[a] = x[a] * c - x[b] * n;
                y[b] = x[b] * c + x[a] * n;
            }
    return y;
}

static Array attention(const Array& q, const Array& k, const Array& v, size_t rows, size_t D, size_t H, size_t K) {
    Array out(q.size());
    for (size_t s = 0; s < rows; s++)
        for (size_t h = 0; h < H; h++) {
            const size_t g = h / (H / K);
            Array p(s + 1);
            float most = -INFINITY, sum = 0;
            for (size_t t = 0; t <= s; t++) {
                for (size_t d = 0; d < D; d++) p[t] += q[(s * H + h) * D + d] * k[(t * K + g) * D + d];
                most = std::fmax(most, p[t] /= std::sqrt(float(D)));
            }
            for (float& x : p) sum += x = std::exp(x - most);
            for (size_t t = 0; t <= s; t++)
                for (size_t d = 0; d < D; d++) out[(s * H + h) * D + d] += p[t] / sum * v[(t * K + g) * D + d];
        }
    return out;
}

int main(int count, char** given) {
    std::ifstream file(given[1], std::ios::binary);
    uint64_t length;
    file.read(reinterpret_cast<char*>(&length), 8);
    header.resize(length);
    file.read(header.data(), std::streamsize(length));
    body.assign(std::istreambuf_iterator<char>(file), {});
    const size_t layers = std::atoi(given[2]), H = std::atoi(given[3]), K = std::atoi(given[4]), D = std::atoi(given[5]);
    const float eps = float(std::atof(given[6]));
    const double theta = std::atof(given[7]);
    const bool swapped = !std::strcmp(given[9], "swapped");
    std::vector<int64_t> ids;
    for (int i = 10; i < count; i++) ids.push_back(std::atoll(given[i]));
    const size_t S = ids.size();
    const std::vector<int64_t> rows{int64_t(S)}, q_heads{int64_t(S), int64_t(H)}, k_heads{int64_t(S), int64_t(K)};

    const Array table = tensor("model.embed_tokens.weight"), last = tensor("model.norm.weight");
    const size_t E = last.size();
    Array x;
    for (int64_t id : ids) x.insert(x.end(), table.begin() + id * E, table.begin() + (id + 1) * E);
    show("model.embed_tokens", x, rows);
    for (size_t layer = 0; layer < layers; layer++) {
        const std::string at = "model.layers." + std::to_string(layer);
        auto weight = [&](const std::string& name) { return tensor(at + name + ".weight"); };
        auto project = [&](const std::string& name, const Array& in) {
            return show(at + name, linear(in, weight(name), S), rows);
        };
        const Array a = show(at + ".input_layernorm", norm(x, weight(".input_layernorm"), eps), rows);
        const Array q = rotated(project(".self_attn.q_proj", a), S, D, theta);
        const Array k = rotated(project(".self_attn.k_proj", a), S, D, theta);
        const Array v = project(".self_attn.v_proj", a);
        show(at + ".self_attn.q_rope", q, q_heads);
        show(at + ".self_attn.k_rope", k, k_heads);
        const Array o = show(at + ".self_attn.context", attention(q, k, v, S, D, H, K), q_heads);
        const Array added = project(".self_attn.o_proj", o);
        for (size_t i = 0; i < x.size(); i++) x[i] += added[i];
        show(at + ".residual_mid", x, rows);
        const Array b = show(at + ".post_attention_layernorm", norm(x, weight(".post_attention_layernorm"), eps), rows);
        Array gate = project(".mlp.gate_proj", b), up = project(".mlp.up_proj", b);
        if (swapped && layer == 1) gate.swap(up);
        for (size_t i = 0; i < gate.size(); i++) up[i] *= gate[i] / (1 + std::exp(-gate[i]));
        const Array down = project(".mlp.down_proj", show(at + ".mlp.act", up, rows));
        for (size_t i = 0; i < x.size(); i++) x[i] += down[i];
        show(at, x, rows);
    }
    const Array normed = show("model.norm", norm(x, last, eps), rows);
    show("lm_head", linear(normed, tensor("lm_head.weight"), S), rows);
    shown["input_ids"] = {"I64", {int64_t(S)}, ids.data(), S * 8};
    write_trace(given[8], shown, "{\"source\":\"plain C++\"}");
    for (Array* each : kept) delete each;
}
